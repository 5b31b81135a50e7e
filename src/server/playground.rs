//! The playground at `/`: a page to try the server with, which needs nothing but the server.

use std::io::Cursor;

use axum::Router;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::IntoResponse;
use axum::routing::get;
use image::ImageFormat;

use super::api::ApiError;
use crate::Error;
use crate::pocket::{Split, draw};

/// Its files by their routes.
const FILES: [(&str, &str, &str); 3] = [
    ("/", "text/html; charset=utf-8", include_str!("playground/index.html")),
    ("/playground.css", "text/css; charset=utf-8", include_str!("playground/playground.css")),
    ("/playground.js", "text/javascript; charset=utf-8", include_str!("playground/playground.js")),
];

/// Nothing but these files, pictures the page has made itself, and questions to this server.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The routes of the page; with `samples` also `GET /playground/sample`, a picture of the pocket world.
pub fn routes<S: Clone + Send + Sync + 'static>(samples: bool) -> Router<S> {
    let routes = if samples { Router::new().route("/playground/sample", get(sample)) } else { Router::new() };
    FILES.into_iter().fold(routes, |routes, (route, kind, text)| {
        let answer = move || {
            let headers = [
                (CONTENT_TYPE, kind),
                (CONTENT_SECURITY_POLICY, POLICY),
                (X_CONTENT_TYPE_OPTIONS, "nosniff"),
                (REFERRER_POLICY, "no-referrer"),
                // Its parts belong together.
                (CACHE_CONTROL, "no-cache"),
            ];
            std::future::ready((headers, text).into_response())
        };
        routes.route(route, get(answer))
    })
}

/// A held-out picture of the pocket world, another each time, as PNG.
async fn sample() -> Result<impl IntoResponse, ApiError> {
    let index = uuid::Uuid::new_v4().as_u64_pair().0 >> 32;
    let drawn = tokio::task::spawn_blocking(move || -> crate::Result<Vec<u8>> {
        let mut bytes = Cursor::new(Vec::new());
        let picture = draw(Split::Test, 0, index, 224)?.picture;
        picture.write_to(&mut bytes, ImageFormat::Png).map_err(|e| Error::Engine(e.to_string()))?;
        Ok(bytes.into_inner())
    });
    let bytes = drawn.await.map_err(|e| Error::Engine(e.to_string()))??;
    Ok((
        [(CONTENT_TYPE, "image/png"), (X_CONTENT_TYPE_OPTIONS, "nosniff"), (CACHE_CONTROL, "no-store")],
        bytes,
    ))
}
