use serde::{Deserialize, Serialize};

use super::{Apgd, ApgdCsr, ApgdT, Attack, AutoAttack, Cw, Eps, Fab, Loss, OnLoss, Pgd, Square};
use crate::{Error, Result};

type Boxed = Box<dyn Attack + Send + Sync>;

/// What may be changed of an attack that goes by its name. `None` is the attack's own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Number of steps.
    pub steps: Option<usize>,
    /// Number of random starts.
    pub restarts: Option<usize>,
    /// Number of target classes, for targeted attacks.
    pub targets: Option<usize>,
    /// Number of queries, for Square.
    pub queries: Option<usize>,
    /// Leave a picture as soon as it is fooled: sooner done, and of no use against another model.
    pub stop_when_fooled: bool,
}

/// An attack by its name.
pub enum Named {
    /// One attack.
    Plain(Boxed),
    /// A suite, which can keep its state.
    AutoAttack(AutoAttack),
}

/// The attacks that [`Named::new`] knows, each with what it is.
pub const NAMES: [(&str, &str); 16] = [
    ("pgd", "PGD on the cross-entropy: 10 steps of eps / 4, the best iterate"),
    ("pgd-csr", "PGD as the paper's authors publish it: the last iterate"),
    ("pgd-fare", "PGD as FARE and TeCoA train: steps of 1/255 with momentum"),
    ("cw", "the paper's authors' C&W: PGD on the margin, 30 steps, within eps"),
    ("cw-l2", "Carlini and Wagner's L2 attack as in torchattacks; it has no eps"),
    ("apgd-ce", "Auto-PGD on the cross-entropy, 100 steps"),
    ("apgd-dlr", "Auto-PGD on the difference of logits ratio, 100 steps"),
    ("apgd-t", "Auto-PGD on the targeted ratio, 9 targets"),
    ("apgd-csr", "what the paper's authors publish as APGD: 30 steps, fixed halving"),
    ("fab", "FAB, 5 restarts of 100 steps"),
    ("fab-t", "FAB with 9 targets"),
    ("square", "Square, 5000 queries and no gradient"),
    ("autoattack", "AutoAttack's standard: apgd-ce, apgd-t, fab-t, square"),
    ("autoattack-plus", "AutoAttack's plus: apgd-ce, apgd-dlr, fab, square, apgd-t, fab-t"),
    ("autoattack-rand", "AutoAttack's rand, for random models: apgd-ce and apgd-dlr with EoT 20"),
    ("autoattack-paper", "what the paper reports as AutoAttack: apgd-ce alone"),
];

impl Named {
    /// The attack called `name`, one of [`NAMES`], or AutoAttack's `custom` as
    /// `custom:apgd-ce+square`: each as it is by its own name (the original's `custom` gives APGD 5
    /// restarts where nothing else is said).
    ///
    /// Gradient attacks are set up for a caller who chooses the pictures: all that are chosen are
    /// attacked, and the best place of each is returned, fooled or not, so that the same pictures
    /// serve the model crafted on and others.
    ///
    /// Settings that an attack has no use for change nothing ([`Settings::unused_by`]).
    ///
    /// # Errors
    /// If there is no such attack.
    pub fn new(name: &str, eps: Eps, settings: &Settings) -> Result<Self> {
        let (plus, eot) = (name == "autoattack-plus", if name == "autoattack-rand" { 20 } else { 1 });
        let plain = |name: &str| plain(name, eps, settings, plus, eot);
        match parts(name) {
            Some(parts) => {
                let attacks = parts.into_iter().map(plain).collect::<Result<Vec<_>>>()?;
                Ok(Self::AutoAttack(AutoAttack::new(name, attacks)?))
            }
            None => Ok(Self::Plain(plain(name)?)),
        }
    }

    /// The attack, whichever it is.
    pub fn as_attack(&self) -> &dyn Attack {
        match self {
            Self::Plain(attack) => attack.as_ref(),
            Self::AutoAttack(suite) => suite,
        }
    }
}

/// The attacks that the suite called `name` strings together; `None` for a single attack.
fn parts(name: &str) -> Option<Vec<&str>> {
    match name {
        "autoattack" => Some(vec!["apgd-ce", "apgd-t", "fab-t", "square"]),
        "autoattack-plus" => Some(vec!["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]),
        "autoattack-rand" => Some(vec!["apgd-ce", "apgd-dlr"]),
        "autoattack-paper" => Some(vec!["apgd-ce"]),
        _ => Some(name.strip_prefix("custom:")?.split('+').collect()),
    }
}

impl Settings {
    /// The first setting given that none of these attacks has a use for, as its flag.
    pub fn unused_by(&self, names: &[String]) -> Option<&'static str> {
        let parts: Vec<&str> =
            names.iter().flat_map(|name| parts(name).unwrap_or_else(|| vec![name.as_str()])).collect();
        let apgd_or_fab = ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t"];
        let any = |takes: &dyn Fn(&str) -> bool| parts.iter().any(|part| takes(part));
        let given = [
            ("--steps", self.steps.is_some(), any(&|part| part != "square")),
            ("--restarts", self.restarts.is_some(), any(&|part| apgd_or_fab.contains(&part))),
            ("--targets", self.targets.is_some(), any(&|part| matches!(part, "apgd-t" | "fab-t"))),
            ("--queries", self.queries.is_some(), any(&|part| part == "square")),
        ];
        given.into_iter().find_map(|(flag, given, used)| (given && !used).then_some(flag))
    }
}

/// PGD with other settings; a step of the presets is a share of eps by the number of steps.
pub(crate) fn with_settings(pgd: Pgd, settings: &Settings) -> Pgd {
    let steps = settings.steps.unwrap_or(pgd.steps);
    Pgd {
        alpha: pgd.alpha * pgd.steps as f64 / steps.max(1) as f64,
        steps,
        stop_when_fooled: settings.stop_when_fooled,
        ..pgd
    }
}

fn plain(name: &str, eps: Eps, settings: &Settings, plus: bool, eot: usize) -> Result<Boxed> {
    let Some((known, _)) = NAMES.iter().find(|(known, _)| *known == name && !known.starts_with("autoattack"))
    else {
        let all: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
        return Err(Error::argument("attack", format!("{} or custom:A+B", all.join(", ")), name));
    };
    // APGD-T and FAB-T have one start per target in `plus` as well.
    let many = if plus && !known.ends_with("-t") { 5 } else { 1 };
    let apgd = Apgd {
        steps: settings.steps.unwrap_or(100),
        restarts: settings.restarts.unwrap_or(many),
        eot,
        only_correct: false,
        keep_best: true,
        stop_when_fooled: settings.stop_when_fooled,
        ..Apgd::standard(eps)
    };
    let fab = Fab {
        steps: settings.steps.unwrap_or(100),
        stop_when_fooled: settings.stop_when_fooled,
        ..Fab::standard(eps)
    };
    let pgd = |pgd| with_settings(pgd, settings);
    Ok(match *known {
        "pgd" => Box::new(pgd(Pgd::new(eps)).on(Loss::CrossEntropy)),
        "pgd-csr" => {
            let attack = pgd(Pgd::csr(eps)).on(Loss::CrossEntropy);
            Box::new(OnLoss { name: name.into(), ..attack })
        }
        "pgd-fare" => {
            let fare = Pgd::fare(eps);
            let steps = settings.steps.unwrap_or(fare.steps);
            let fare = Pgd { steps, stop_when_fooled: settings.stop_when_fooled, ..fare };
            Box::new(OnLoss { name: name.into(), ..fare.on(Loss::CrossEntropy) })
        }
        "cw" => {
            let cw = Pgd::cw(eps);
            Box::new(OnLoss { maximise: pgd(cw.maximise), ..cw })
        }
        "cw-l2" => Box::new(Cw { steps: settings.steps.unwrap_or(Cw::default().steps), ..Cw::default() }),
        "apgd-ce" => Box::new(apgd.on(Loss::CrossEntropy)),
        "apgd-dlr" => Box::new(apgd.on(Loss::Dlr)),
        "apgd-t" => Box::new(ApgdT { apgd, targets: settings.targets.unwrap_or(9) }),
        "apgd-csr" => {
            let csr = ApgdCsr::new(eps);
            Box::new(ApgdCsr { steps: settings.steps.unwrap_or(csr.steps), ..csr }.attack())
        }
        "fab" => Box::new(Fab { targets: None, restarts: settings.restarts.unwrap_or(5), ..fab }),
        "fab-t" => {
            let targets = Some(settings.targets.unwrap_or(9));
            Box::new(Fab { targets, restarts: settings.restarts.unwrap_or(many), ..fab })
        }
        // The last that NAMES has.
        _ => {
            let square = Square::standard(eps);
            let queries = settings.queries.unwrap_or(square.queries);
            Box::new(Square { queries, ..square }.on(Loss::Margin { kappa: None }))
        }
    })
}
