//! `POST /v1/compare`: the defended and the undefended model's answers to one request, and how far
//! the two towers disagree on its pictures.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use serde_json::json;

use super::Served;
use super::api::{ApiError, ChatRequest, now};
use super::chat::{Asked, Head, completion, events, stream};
use super::conversation::{Api, Reader};

/// Answers a chat completion's request by both models.
///
/// Streamed, the first event says what is to be said of the pictures, and the chunks of both answers
/// follow as they come, each with its model's name.
pub async fn compare(
    State(served): State<Arc<Served>>,
    body: Result<Json<ChatRequest>, JsonRejection>,
) -> Result<Response, ApiError> {
    let Json(request) = body?;
    let Some(undefended) = &served.undefended else {
        return Err(ApiError::not_found("this server has no undefended model to compare with (--compare)"));
    };
    let defended = &served.model;
    if request.model != defended.name {
        return Err(ApiError::no_model(&request.model, &format!("`{}` to compare", defended.name)));
    }
    let mut asked = Asked::read(&request, &served)?;
    // What is drawn should not be what they differ by.
    if asked.sampling.temperature.is_some_and(|t| t > 0.0) {
        asked.sampling.seed.get_or_insert_with(|| uuid::Uuid::new_v4().as_u64_pair().0);
    }
    let mut reader = Reader::new(&served, Api::Chat).looking();
    let turns = reader.messages(&request.messages).await?;
    let seen = reader.seen();
    let head = json!({
        "id": format!("cmp-{}", uuid::Uuid::new_v4().simple()),
        "object": "radapt.comparison",
        "created": now(),
        "model": defended.name,
        "pictures": seen,
    });
    let headers = defended.headers(served.flagged(&seen));
    let (ours, theirs) =
        (asked.answers(&served, defended, &turns).await?, asked.answers(&served, undefended, &turns).await?);
    let [our_head, their_head] = [defended, undefended].map(|model| Head::new(model, model.x_radapt(None)));
    if asked.stream {
        let usage = asked.include_usage;
        let both = futures::stream::select(events(ours, our_head, usage), events(theirs, their_head, usage));
        let first = futures::stream::once(async move { Ok(head.to_string()) });
        return Ok((headers, stream(Box::pin(first.chain(both))).await?).into_response());
    }
    let (ours, theirs) = futures::try_join!(completion(ours, our_head), completion(theirs, their_head))?;
    let mut comparison = head;
    comparison["defended"] = ours;
    comparison["undefended"] = theirs;
    Ok((headers, Json(comparison)).into_response())
}
