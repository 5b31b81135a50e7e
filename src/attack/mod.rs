//! Attacks: pictures close to given ones that a model gets wrong.
//!
//! An attack lives on pixels `(B, 3, H, W)` f32 in [0, 1], before the defence's filter and the
//! normalisation, and stays in the ball |x' - x| <= eps ([`Eps`], in the same units) and in the
//! box [0, 1]. It is built from four parts:
//!
//! - a [`Classifier`] (a tower with a zero-shot head: [`TowerClassifier`]) or the tower's features
//!   alone ([`FeatureObjective`], for models that read patch tokens, such as LLaVA);
//! - an [`Objective`]: what is to grow, picture by picture, with its gradient at the pixels;
//! - an attack that climbs it: [`Maximise`] takes any objective ([`Pgd`]), [`Attack`] takes a
//!   labelled task ([`Classification`]) and is what AutoAttack strings together;
//! - a result that knows what it is: [`Crafted`] names the model it was made on, and becomes a
//!   figure ([`Scored`]) only together with its [`Threat`].
//!
//! [`vattack`] is apart from these: it looks at another crop of the picture in every step.
//!
//! Whatever an attack draws at random is keyed by the picture ([`Pictures`]), and a tower on a CPU
//! is given one picture at a time, or is packed, so a picture's result does not depend on its
//! batch. On a GPU several go through together, and its last bits do: the same pictures in the same
//! batches give the same result there, on the same card and driver.
//!
//! Pictures crafted on the undefended model are scored under `transfer`; nothing makes them adaptive:
//!
//! ```
//! use candle_core::Device;
//! use radapt::attack::{
//!     Attack, Classification, Loss, Pgd, Pictures, Subject, ThreatKind, TowerClassifier, key,
//! };
//! use radapt::data::LabelledSet;
//! use radapt::defense::DefenseOptions;
//! use radapt::image::DecodeLimits;
//! use radapt::model::{Lookup, Model};
//! use radapt::pocket::Split;
//! use radapt::text::ZeroShotHead;
//!
//! # fn main() -> radapt::Result<()> {
//! let device = Device::Cpu;
//! let model = Model::find("pocket-clip", &Lookup::default())?;
//! let preprocess = model.preprocess(None)?;
//!
//! let set = LabelledSet::pocket(Split::Test, 0, 4, preprocess.width)?;
//! let limits = DecodeLimits::default();
//! let read = (0..4).map(|i| set.picture(i, &limits)).collect::<radapt::Result<Vec<_>>>()?;
//! let keys = set.items().iter().map(|item| key(&item.id)).collect();
//! let clean = Pictures::new(&preprocess.batch(&read, &device)?, keys)?;
//! let labels: Vec<usize> = set.items().iter().map(|item| item.label).collect();
//!
//! let head = ZeroShotHead::new(&model.text(&device)?, set.classes(), &["a {class}."])?;
//! let tower = model.tower(&preprocess, None, &device)?;
//! let defense = DefenseOptions::default().build(&tower, || model.fingerprint())?;
//! let subject = Subject::new("pocket-clip", &defense)?;
//! let defended = TowerClassifier::new(tower.with(defense.inserts()), head.clone(), subject)?;
//! let undefended = TowerClassifier::new(tower, head, Subject::undefended("pocket-clip"))?;
//!
//! let surrogate = Classification::new(&undefended, labels.clone())?;
//! let target = Classification::new(&defended, labels)?;
//! let clean_correct = target.correct(clean.pixels(), &[0, 1, 2, 3])?;
//! let pgd = Pgd { steps: 2, ..Pgd::new("8/255".parse()?) }.on(Loss::CrossEntropy);
//! let crafted = pgd.craft(&surrogate, &clean, 0, &mut |_| {})?;
//!
//! let scored = crafted.score(&target, ThreatKind::Transfer, &clean_correct)?;
//! println!("{:?}: {:?} robust", scored.threat(), scored.robust());
//! assert!(crafted.score(&target, ThreatKind::Adaptive, &clean_correct).is_err());
//! # Ok(())
//! # }
//! ```

mod apgd;
mod apgd_csr;
mod autoattack;
mod ball;
mod classifier;
mod crafted;
mod cw;
mod eps;
mod fab;
mod feature;
mod loss;
mod mixed;
mod named;
mod objective;
mod pgd;
mod pictures;
mod projection;
mod quantise;
mod random;
mod resized;
mod square;
mod threat;
pub mod vattack;

pub use apgd::{Apgd, ApgdT};
pub use apgd_csr::ApgdCsr;
pub use autoattack::{AutoAttack, Evaluated, Flag, flags_of_outcomes};
pub use ball::Ball;
pub use classifier::{CosineHead, Head, TowerClassifier};
pub use crafted::{Crafted, Outcome, Recipe, Scored};
pub use cw::Cw;
pub use eps::Eps;
pub use fab::Fab;
pub use feature::{Direction, Feature, FeatureObjective, FeatureTower};
pub use loss::{Loss, LossValues};
pub use mixed::Mixed;
pub(crate) use named::with_settings;
pub use named::{NAMES, Named, Settings};
pub use objective::{
    Classification, ClassificationObjective, Classifier, Evaluation, Goal, Objective, in_batches,
};
pub use pgd::Pgd;
pub use pictures::{Pictures, key};
pub use quantise::quantise;
pub use random::{picture_rng, uniform};
pub use resized::Resized;
pub use square::Square;
pub use threat::{Subject, Threat, ThreatChoice, ThreatKind};

use serde_json::{Value, json};

use crate::Result;

/// How far an attack is.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Steps done.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
    /// Pictures under attack in this step.
    pub active: usize,
    /// Pictures of those the attack began with that it has fooled so far; `None` where the
    /// objective knows no success.
    pub fooled: Option<usize>,
}

/// An attack that climbs any objective.
pub trait Maximise {
    /// The attack's name in results: `pgd`.
    fn name(&self) -> &'static str;

    /// All of its parameters, for the record.
    fn parameters(&self) -> Value;

    /// The radius of its ball; `None` where it has none.
    fn eps(&self) -> Option<Eps>;

    /// Whether it is made for models that are random.
    fn expects_randomness(&self) -> bool {
        false
    }

    /// Crafts a picture for every picture chosen in `pictures`; the others are returned unchanged.
    ///
    /// # Errors
    /// If a parameter is out of range, `pictures` and `objective` do not go together, or the
    /// model fails.
    fn maximise(
        &self,
        objective: &dyn Objective,
        pictures: &Pictures,
        seed: u64,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Crafted>;
}

/// An attack on a labelled task.
pub trait Attack {
    /// The attack's name in results: `pgd`, `apgd-ce`.
    fn name(&self) -> &str;

    /// All of its parameters, for the record.
    fn parameters(&self) -> Value;

    /// The radius of its ball; `None` where it has none.
    fn eps(&self) -> Option<Eps>;

    /// The fewest classes it works with.
    fn fewest_classes(&self) -> usize {
        2
    }

    /// The number of target classes it would take, where it takes any.
    fn targets(&self) -> Option<usize> {
        None
    }

    /// Whether it is made for models that are random.
    fn expects_randomness(&self) -> bool {
        false
    }

    /// Crafts a picture for every picture chosen in `pictures`; the others are returned unchanged.
    ///
    /// # Errors
    /// As [`Maximise::maximise`].
    fn craft(
        &self,
        task: &Classification,
        pictures: &Pictures,
        seed: u64,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Crafted>;
}

/// A [`Maximise`] with the untargeted loss it climbs: PGD on the cross-entropy is PGD, on the
/// margin with kappa 0 it is the CSR authors' C&W.
#[derive(Debug, Clone, PartialEq)]
pub struct OnLoss<M> {
    /// The name in results.
    pub name: String,
    /// What climbs.
    pub maximise: M,
    /// What it climbs.
    pub loss: Loss,
}

impl<M: Maximise> Attack for OnLoss<M> {
    fn name(&self) -> &str {
        &self.name
    }

    fn parameters(&self) -> Value {
        let mut parameters = self.maximise.parameters();
        parameters["loss"] = json!(self.loss);
        parameters
    }

    fn eps(&self) -> Option<Eps> {
        self.maximise.eps()
    }

    fn fewest_classes(&self) -> usize {
        self.loss.classes().max(2)
    }

    fn expects_randomness(&self) -> bool {
        self.maximise.expects_randomness()
    }

    fn craft(
        &self,
        task: &Classification,
        pictures: &Pictures,
        seed: u64,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Crafted> {
        let objective = task.objective(self.loss)?;
        Ok(self.maximise.maximise(&objective, pictures, seed, progress)?.named(&self.name))
    }
}
