//! `POST /v1/perturb`: an adversarial version of a picture, made while the asker watches.
//!
//! PGD turns what the language model reads of the picture away from what it reads of the clean one, on
//! the undefended tower (`transfer`) or through the defence (`adaptive`). One picture at a time is
//! made; a client that goes away ends it.

use std::io::Cursor;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use candle_core::Tensor;
use futures::Stream;
use image::{ImageFormat, RgbImage};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Served;
use super::api::{ApiError, refuse};
use super::chat::stream;
use crate::attack::{
    Eps, Evaluation, Feature, FeatureObjective, FeatureTower, Maximise, Objective, Pgd, Pictures, Settings,
    Subject, ThreatKind, key, quantise, with_settings,
};
use crate::engine::Engine;
use crate::image::{Preprocess, pixels_from_rgb, rgb_from_pixels};
use crate::model::ModelKind;
use crate::tower::VisionTower;
use crate::{Error, Result};

/// The largest radius, in steps of 1/255: beyond it anybody sees the change.
const MOST_EPS: u8 = 32;
/// The most steps.
const MOST_STEPS: usize = 100;
/// Steps where none are given.
const STEPS: usize = 20;

/// Where adversarial pictures are made.
pub struct Workshop {
    /// The tower with nothing put in, and with its defence, and who that is.
    plain: (FeatureTower, Subject),
    defended: (FeatureTower, Subject),
    preprocess: Preprocess,
    places: Arc<Semaphore>,
}

/// The body of `POST /v1/perturb`.
#[derive(Debug, Deserialize)]
pub struct PerturbRequest {
    image: String,
    eps: String,
    threat: ThreatKind,
    steps: Option<usize>,
    seed: Option<u64>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

impl Workshop {
    /// For a model whose pictures are prepared once, before anything else.
    ///
    /// # Errors
    /// If the model cuts pictures into tiles, or has mistral.rs' own tower.
    pub fn new(engine: &Engine) -> Result<Self> {
        let kind = engine.model().kind;
        let (Some(tower), Some(subject), true) =
            (engine.tower(), engine.subject(), kind != ModelKind::LlavaNext)
        else {
            let expected = "a model that takes a picture as one";
            return Err(Error::argument("--perturb", expected, &engine.model().name));
        };
        Ok(Self {
            plain: (tower.undefended(), Subject::undefended(&subject.model)),
            defended: (tower.clone(), subject.clone()),
            preprocess: engine.preprocess().clone(),
            places: Arc::new(Semaphore::new(1)),
        })
    }
}

/// Makes one, as an event stream: events of progress, and the picture in the last.
pub async fn perturb(
    State(served): State<Arc<Served>>,
    body: std::result::Result<Json<PerturbRequest>, JsonRejection>,
) -> std::result::Result<Response, ApiError> {
    let Json(request) = body?;
    let Some(workshop) = &served.workshop else {
        return Err(ApiError::not_found("this server makes no adversarial pictures (--perturb)"));
    };
    refuse(&request.rest, "")?;
    let bad =
        |field: &str, expected: String| ApiError::bad_request(format!("{field}: expected {expected}"), field);
    let eps = (1..=MOST_EPS).map(Eps::of_255).find(|eps| eps.to_string() == request.eps);
    let Some(eps) = eps else {
        return Err(bad("eps", format!("1/255 to {MOST_EPS}/255")));
    };
    let steps = request.steps.unwrap_or(STEPS);
    if !(1..=MOST_STEPS).contains(&steps) {
        return Err(bad("steps", format!("1 to {MOST_STEPS}")));
    }
    if request.threat == ThreatKind::Adaptive && workshop.defended.1.is_undefended() {
        return Err(bad("threat", "transfer: this model has no defence to adapt to".into()));
    }
    let Ok(place) = workshop.places.clone().try_acquire_owned() else {
        let message = "another picture is being made; come back later";
        return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, message, None).with_code("server_busy"));
    };
    let picture = served.picture(&request.image, "image").await.map_err(|error| error.at("image"))?;
    workshop.preprocess.size_of(picture.height(), picture.width())?;
    let surrogate = if request.threat == ThreatKind::Adaptive { &workshop.defended } else { &workshop.plain };
    let work = Work {
        surrogate: surrogate.clone(),
        towers: [workshop.plain.0.clone(), workshop.defended.0.clone()],
        surrogate_name: match surrogate.1.is_undefended() {
            true => format!("{}:undefended", served.options.name),
            false => served.options.name.clone(),
        },
        clean: workshop.preprocess.prepare(&picture),
        eps,
        threat: request.threat,
        steps,
        seed: request.seed.unwrap_or(0),
    };
    let done = work.begin(place);
    stream(Box::pin(done)).await
}

/// One picture to make.
struct Work {
    surrogate: (FeatureTower, Subject),
    /// The undefended and the defended tower, which judge it.
    towers: [FeatureTower; 2],
    /// The model crafted on, as this server calls it.
    surrogate_name: String,
    clean: RgbImage,
    eps: Eps,
    threat: ThreatKind,
    steps: usize,
    seed: u64,
}

/// Tells the work that nobody waits for it any more.
struct Watcher(Arc<AtomicBool>);

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Work {
    fn begin(
        self,
        place: OwnedSemaphorePermit,
    ) -> impl Stream<Item = std::result::Result<String, ApiError>> + Send {
        let (told, mut events) = unbounded_channel();
        let gone = Arc::new(AtomicBool::new(false));
        let watcher = Watcher(gone.clone());
        let working = tokio::task::spawn_blocking(move || {
            let made = self.make(&told, &gone);
            drop(place);
            made
        });
        async_stream::stream! {
            let _watcher = watcher;
            while let Some(event) = events.recv().await {
                yield Ok(event);
            }
            yield match working.await {
                Ok(made) => made.map(|made| made.to_string()).map_err(ApiError::from),
                Err(_) => Err(Error::Engine("making the picture was cut off".into()).into()),
            };
        }
    }

    fn make(self, told: &UnboundedSender<String>, gone: &Arc<AtomicBool>) -> Result<Value> {
        let crafted = match &self.surrogate.0 {
            FeatureTower::Clip(tower, feature) => self.craft(tower.as_ref().clone(), *feature, told, gone)?,
            FeatureTower::Qwen(tower) => {
                let at = tower.at(self.clean.height() as usize, self.clean.width() as usize)?;
                self.craft(at, Feature::Merged, told, gone)?
            }
        };
        let adversarial = rgb_from_pixels(&crafted)?;
        let linf = self.clean.as_raw().iter().zip(adversarial.as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
        let [undefended, defended] = &self.towers;
        Ok(json!({
            "object": "radapt.perturbation",
            "attack": "pgd",
            "steps": self.steps,
            "eps": self.eps,
            "threat": self.threat,
            "surrogate": self.surrogate_name,
            "linf": linf.unwrap_or(0),
            "cosine": {
                "undefended": self.cosine(undefended, &adversarial)?,
                "defended": self.cosine(defended, &adversarial)?,
            },
            "clean": url(&self.clean)?,
            "picture": url(&adversarial)?,
            "magnified": url(&self.magnified(&adversarial))?,
        }))
    }

    /// The adversarial picture's pixels as 8 bits hold them, `(3, H, W)`.
    fn craft<T: VisionTower>(
        &self,
        tower: T,
        feature: Feature,
        told: &UnboundedSender<String>,
        gone: &Arc<AtomicBool>,
    ) -> Result<Tensor> {
        let pixels = pixels_from_rgb(&self.clean, tower.device())?.unsqueeze(0)?;
        let objective = FeatureObjective::away_from_clean(tower, self.surrogate.1.clone(), feature, &pixels)?;
        let objective = Stoppable { objective, gone: gone.clone() };
        let settings = Settings { steps: Some(self.steps), ..Settings::default() };
        let pgd = with_settings(Pgd::new(self.eps), &settings);
        let pictures = Pictures::new(&pixels, vec![key("picture")])?;
        let crafted = pgd.maximise(&objective, &pictures, self.seed, &mut |progress| {
            let event = json!({
                "object": "radapt.perturbation.progress",
                "step": progress.step,
                "steps": progress.steps,
            });
            // Where nobody listens, the objective ends the work.
            let _ = told.send(event.to_string());
        })?;
        let crafted = quantise(crafted.pixels(), &pixels, self.eps)?;
        Ok(crafted.squeeze(0)?)
    }

    /// The mean cosine of a tower's features with those of the clean picture.
    fn cosine(&self, tower: &FeatureTower, adversarial: &RgbImage) -> Result<f64> {
        Ok(1.0 - crate::eval::suspicion::disagreement(&tower.of(&self.clean)?, &tower.of(adversarial)?)?)
    }

    /// The change, made visible: grey where nothing is changed, full where it is by eps.
    fn magnified(&self, adversarial: &RgbImage) -> RgbImage {
        let most = f64::from(self.eps.steps().max(1));
        let mut shown = self.clean.clone();
        for (clean, changed) in shown.iter_mut().zip(adversarial.as_raw()) {
            let change = (f64::from(*changed) - f64::from(*clean)) / most;
            *clean = (127.5 + 127.5 * change).round().clamp(0.0, 255.0) as u8;
        }
        shown
    }
}

/// An objective that ends when its asker has gone.
struct Stoppable<O> {
    objective: O,
    gone: Arc<AtomicBool>,
}

impl<O> Stoppable<O> {
    fn check(&self) -> Result<()> {
        if self.gone.load(Ordering::Relaxed) {
            return Err(Error::Engine("nobody waits for the picture any more".into()));
        }
        Ok(())
    }
}

impl<O: Objective> Objective for Stoppable<O> {
    fn subject(&self) -> &Subject {
        self.objective.subject()
    }

    fn pictures(&self) -> usize {
        self.objective.pictures()
    }

    fn describe(&self) -> Value {
        self.objective.describe()
    }

    fn values(&self, pixels: &Tensor, rows: &[usize]) -> Result<Evaluation> {
        self.check()?;
        self.objective.values(pixels, rows)
    }

    fn values_and_gradient(&self, pixels: &Tensor, rows: &[usize]) -> Result<(Evaluation, Tensor)> {
        self.check()?;
        self.objective.values_and_gradient(pixels, rows)
    }
}

/// A picture as a `data:` URL of a PNG.
fn url(picture: &RgbImage) -> Result<String> {
    let mut bytes = Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, ImageFormat::Png)
        .map_err(|e| Error::Engine(format!("the picture cannot be written: {e}")))?;
    Ok(format!("data:image/png;base64,{}", STANDARD.encode(bytes.into_inner())))
}
