//! V-Attack: makes a model see one object as another by the value features of a CLIP's patches.
//!
//! The values of a block carry what each patch shows, less mixed with the rest of the picture than
//! what attention makes of them. V-Attack (arXiv 2511.20223, CVPR 2026) finds the patches whose
//! values are nearest to the text of the object in the picture (the source), and moves these away
//! from it and towards the text of another (the target). It needs nothing but one or several CLIPs,
//! the surrogates; what it makes transfers to models that read a CLIP's patches, such as LLaVA.
//!
//! Two forms of it are published, and [`VAttack`] has a preset for each:
//!
//! - [`VAttack::notebook`], what the authors put online in June 2025 (`Attack.ipynb`), quirks and all;
//! - [`VAttack::paper`], the method as the paper has it, self-values and several surrogates.
//!
//! A model without a text tower, such as a Qwen-VL, can be a target of what is crafted on a CLIP; an
//! adaptive attack on it is [`super::Pgd`] on a [`super::FeatureObjective`] of its own tower.

mod crop;
mod maps;
mod mask;
mod values;

pub use crop::{Crop, Window};
pub use maps::{map_of_mask, map_of_perturbation};
pub use mask::Localised;
pub use values::{Surrogate, ValueLoss};

use std::fmt;
use std::str::FromStr;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use self::crop::Resize;
use super::crafted::Finished;
use super::objective::without_nan;
use super::pictures::select;
use super::{Ball, Crafted, Eps, Pictures, Progress, Recipe, Subject, picture_rng, uniform};
use crate::tower::VisionTower;
use crate::tower::clip::Clip;
use crate::{Error, Result};

/// Which published form of V-Attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// The authors' notebook.
    Notebook,
    /// The paper.
    Paper,
}

impl FromStr for Preset {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "notebook" => Ok(Self::Notebook),
            "paper" => Ok(Self::Paper),
            other => Err(Error::argument("preset", "notebook or paper", other)),
        }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Notebook => "notebook",
            Self::Paper => "paper",
        })
    }
}

/// How the values of the last block are enhanced before they are compared with the source's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "by")]
pub enum Localise {
    /// Not at all.
    Values,
    /// Attention with the values as queries and keys too, Attn(V, V, V).
    SelfValues,
    /// Rounds of softmax(K K^T / sqrt(d)) V by heads, with the keys that a block has of the clean
    /// picture.
    Keys {
        /// The block, counted from 0; where not given 8 of 24, and the same share of another number.
        block: Option<usize>,
        /// How often.
        rounds: usize,
    },
}

/// What the loss of the masked patches is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sum {
    /// Nothing.
    Patches,
    /// The number of patches that the tower has, so that towers with smaller patches weigh no more.
    Mean,
}

/// V-Attack and everything there is to set.
///
/// Maximised is, over the patches of the mask and the last [`VAttack::blocks`] blocks, the sum of
/// cos(token, target) - cos(token, source); see [`ValueLoss`]. The mask is those patches of the
/// picture whose score is above (lowest + highest) / 2.
///
/// A surrogate whose tower takes other pictures than those given is shown them resized.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VAttack {
    /// Which form this began as.
    pub preset: Preset,
    /// The radius of the ball.
    pub eps: Eps,
    /// The size of a step, in pixel units of [0, 1].
    pub alpha: f64,
    /// Number of steps.
    pub steps: usize,
    /// Begin at x + U(-alpha, alpha), drawn by the picture's key, instead of at the picture.
    pub random_start: bool,
    /// v <- momentum v + g / mean|g| takes the place of the gradient g (Dong et al. 2018); 0 is plain
    /// sign steps.
    pub momentum: f64,
    /// Number of blocks whose values are in the loss, the last ones.
    pub blocks: usize,
    /// Whether the loss is on Attn(V, V, V) instead of V.
    pub enhance: bool,
    /// How the mask is found.
    pub localise: Localise,
    /// Which part of the picture a step looks at.
    pub crop: Crop,
    /// How the loss is summed.
    pub sum: Sum,
    /// Find the mask and the crop's box again in every step, from the values of the *last crop* as
    /// if they were the whole picture's: the notebook's own slip. Otherwise they are the clean
    /// picture's throughout.
    pub mask_from_crops: bool,
    /// Take the gradient's sign at the tower's input, and resize *that* to the crop, as the notebook
    /// does; all surrogates must then take pictures of one size. Otherwise the gradient goes through
    /// the resize, and its sign is taken at the picture.
    pub resize_signs: bool,
}

impl VAttack {
    /// As in the authors' notebook of June 2025: the values of the last four blocks, the mask by 20
    /// rounds of the keys of block 8 (of 24), the semantic-centric crop, 200 steps of 3/255 from
    /// x + U(-alpha, alpha).
    ///
    /// Its quirks are kept: [`VAttack::mask_from_crops`], [`VAttack::resize_signs`], and a start that
    /// is not cut to [0, 1] before the first step. Not kept is what it does to its results (JPEG, and
    /// rounding down). It squashes pictures to the tower's square ([`crate::image::Contract::Squash`]).
    pub fn notebook(eps: Eps) -> Self {
        Self {
            preset: Preset::Notebook,
            eps,
            alpha: 3.0 / 255.0,
            steps: 200,
            random_start: true,
            momentum: 0.0,
            blocks: 4,
            enhance: false,
            localise: Localise::Keys { block: None, rounds: 20 },
            crop: Crop::Centric { least: 0.75, share: 0.15 },
            sum: Sum::Patches,
            mask_from_crops: true,
            resize_signs: true,
        }
    }

    /// As in the paper: Attn(V, V, V) of the last block for the mask and for the loss, one or several
    /// surrogates, 300 steps of 1/255, each on a random crop of at least three quarters of the
    /// picture and with the gradient through its resize, the mask that of the whole clean picture.
    ///
    /// The crop and the mean over patches are those of the code that came with the paper. That code
    /// climbs with Adam, not with signs, and applies the mask of one crop to all others unmoved;
    /// neither is in the paper's account of the method, nor here.
    pub fn paper(eps: Eps) -> Self {
        Self {
            preset: Preset::Paper,
            alpha: 1.0 / 255.0,
            steps: 300,
            random_start: false,
            blocks: 1,
            enhance: true,
            localise: Localise::SelfValues,
            crop: Crop::Random { least: 0.75 },
            sum: Sum::Mean,
            mask_from_crops: false,
            resize_signs: false,
            ..Self::notebook(eps)
        }
    }

    /// A form by its name.
    pub fn preset(preset: Preset, eps: Eps) -> Self {
        match preset {
            Preset::Notebook => Self::notebook(eps),
            Preset::Paper => Self::paper(eps),
        }
    }

    /// That it can be run on a tower, whatever the pictures.
    ///
    /// # Errors
    /// If a number is out of range, or the tower has no such blocks.
    pub fn check_tower(&self, tower: &Clip) -> Result<()> {
        self.check_numbers()?;
        let count = tower.spec().blocks;
        if self.blocks == 0 || self.blocks > count {
            return Err(Error::argument("blocks", format!("1 to {count} for this tower"), self.blocks));
        }
        match self.localise {
            Localise::Keys { block: Some(block), .. } if block >= count => {
                Err(Error::argument("key block", format!("0 to {} for this tower", count - 1), block))
            }
            _ => Ok(()),
        }
    }

    fn check_numbers(&self) -> Result<()> {
        for (what, value) in [("alpha", self.alpha), ("momentum", self.momentum)] {
            if !((value as f32).is_finite() && value >= 0.0) {
                return Err(Error::argument(what, "a number from 0", value));
            }
        }
        self.crop.check()
    }

    fn check(&self, surrogates: &[Surrogate], pictures: &Pictures) -> Result<()> {
        self.check_numbers()?;
        let Some(first) = surrogates.first() else {
            return Err(Error::argument("surrogates", "at least one", "none"));
        };
        for surrogate in surrogates {
            if surrogate.pictures() != pictures.len() {
                let expected = format!("for as many pictures as there are, {}", pictures.len());
                return Err(Error::argument("words", expected, surrogate.pictures()));
            }
            if self.resize_signs && surrogate.side() != first.side() {
                let expected = format!("all of one picture size, {}, in the notebook's form", first.side());
                return Err(Error::argument("surrogates", expected, surrogate.side()));
            }
        }
        Ok(())
    }

    /// Crafts a picture for every picture chosen in `pictures`, `(B, 3, H, W)`; the others are
    /// returned unchanged. Each surrogate has the words of all of them.
    ///
    /// # Errors
    /// If a parameter is out of range, surrogates and pictures do not go together, or a model fails.
    pub fn craft(
        &self,
        surrogates: &[Surrogate],
        pictures: &Pictures,
        seed: u64,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Made> {
        self.craft_with(surrogates, pictures, seed, &Drawn::default(), progress)
    }

    /// The same with some of what is drawn at random given: for comparisons with other programs.
    ///
    /// # Errors
    /// As [`VAttack::craft`], or if what is given does not fit.
    pub fn craft_with(
        &self,
        surrogates: &[Surrogate],
        pictures: &Pictures,
        seed: u64,
        drawn: &Drawn,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Made> {
        self.check(surrogates, pictures)?;
        drawn.check(self, pictures)?;
        let mut finished = Finished::new(pictures)?;
        let rows = pictures.rows();
        let mut localised = vec![None; pictures.len()];
        if !rows.is_empty() {
            let losses = surrogates.iter().map(|s| ValueLoss::new(self, s)).collect::<Result<Vec<_>>>()?;
            let mut walk = Walk::new(self, surrogates, &losses, pictures, rows, seed, drawn)?;
            for (&row, found) in walk.rows.iter().zip(&walk.views[0].clean) {
                localised[row] = Some(found.clone());
            }
            walk.run(seed, drawn, &mut finished, progress)?;
        }
        let recipe = Recipe {
            attack: "v-attack".into(),
            parameters: json!(self),
            objective: json!({
                "loss": "value",
                "surrogates": surrogates.iter().map(|s| json!({
                    "model": s.subject(), "weight": s.weight(), "side": s.side(),
                })).collect::<Vec<_>>(),
            }),
            eps: Some(self.eps),
            seed,
            crafted_on: together(surrogates),
            quantised: false,
        };
        Ok(Made { crafted: finished.crafted(pictures, recipe)?, localised })
    }
}

/// The name of one or several surrogates.
fn together(surrogates: &[Surrogate]) -> Subject {
    if let [one] = surrogates {
        return one.subject().clone();
    }
    let name = |s: &Surrogate| s.subject().to_string();
    let model = surrogates.iter().map(name).collect::<Vec<_>>().join(" + ");
    if surrogates.iter().all(|s| s.subject().is_undefended()) {
        return Subject::undefended(model);
    }
    let mut hash = Sha256::new();
    for surrogate in surrogates {
        hash.update(surrogate.subject().digest.as_deref().unwrap_or("none"));
        hash.update([0]);
    }
    let digest = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Subject { model, defense: None, digest: Some(digest) }
}

/// What V-Attack returns.
#[derive(Debug, Clone)]
pub struct Made {
    /// The pictures, with their recipe and what became of each: losses are those of the whole
    /// picture under the clean picture's mask.
    pub crafted: Crafted,
    /// Where the first surrogate found each picture's source, `None` for pictures not chosen.
    pub localised: Vec<Option<Localised>>,
}

/// What is not left to chance.
#[derive(Debug, Clone, Default)]
pub struct Drawn {
    /// The start's noise `(B, 3, H, W)`, in units of alpha: [-1, 1].
    pub noise: Option<Tensor>,
    /// The crop of every step, for all pictures.
    pub windows: Option<Vec<Window>>,
}

impl Drawn {
    fn check(&self, attack: &VAttack, pictures: &Pictures) -> Result<()> {
        if let Some(noise) = &self.noise
            && noise.dims() != pictures.pixels().dims()
        {
            let expected = format!("shape {:?}", pictures.pixels().dims());
            return Err(Error::argument("noise", expected, format!("{:?}", noise.dims())));
        }
        if let Some(windows) = &self.windows {
            let whole = Window::whole(size(pictures.pixels())?);
            if windows.len() != attack.steps {
                return Err(Error::argument(
                    "windows",
                    format!("one per step, {}", attack.steps),
                    windows.len(),
                ));
            }
            if let Some(window) = windows.iter().find(|w| w.height * w.width == 0 || !whole.contains(w)) {
                return Err(Error::argument("windows", format!("within {whole:?}"), format!("{window:?}")));
            }
        }
        Ok(())
    }
}

/// Height and width of pixels `(B, 3, H, W)`.
fn size(pixels: &Tensor) -> Result<(usize, usize)> {
    Ok((pixels.dim(2)?, pixels.dim(3)?))
}

/// What one surrogate sees of the pictures under attack.
struct View<'a> {
    surrogate: &'a Surrogate,
    loss: &'a ValueLoss<'a>,
    /// Of the clean pictures.
    clean: Vec<Localised>,
    /// What masks are cut from.
    now: Vec<Localised>,
    /// See [`Localise::Keys`].
    ties: Vec<Option<Tensor>>,
}

impl View<'_> {
    /// Windows of the pictures `(R, 3, H, W)`, resized to the tower's, and the resizes.
    fn show(&self, pixels: &Tensor, windows: &[Window]) -> Result<(Tensor, Vec<Resize>)> {
        let side = self.surrogate.side();
        let resizes = windows
            .iter()
            .map(|w| Resize::smooth((w.height, w.width), (side, side), pixels.device()))
            .collect::<Result<Vec<_>>>()?;
        let parts = windows
            .iter()
            .zip(&resizes)
            .enumerate()
            .map(|(i, (window, resize))| resize.apply(&window.of(&pixels.narrow(0, i, 1)?)?));
        Ok((Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?, resizes))
    }

    fn masks(&self, size: (usize, usize), windows: &[Window]) -> Vec<Vec<bool>> {
        self.now.iter().zip(windows).map(|(found, window)| found.cropped(size, window)).collect()
    }
}

/// The pictures under attack; all tensors `(R, 3, H, W)`.
struct Walk<'a> {
    attack: &'a VAttack,
    views: Vec<View<'a>>,
    rows: Vec<usize>,
    keys: Vec<u64>,
    size: (usize, usize),
    ball: Ball,
    pixels: Tensor,
    velocity: Option<Tensor>,
    /// The box that each picture's crop keeps inside.
    bounds: Vec<Window>,
    clean_loss: Vec<f64>,
}

impl<'a> Walk<'a> {
    fn new(
        attack: &'a VAttack,
        surrogates: &'a [Surrogate],
        losses: &'a [ValueLoss<'a>],
        pictures: &Pictures,
        rows: Vec<usize>,
        seed: u64,
        drawn: &Drawn,
    ) -> Result<Self> {
        let clean = select(pictures.pixels(), &rows)?;
        let size = size(&clean)?;
        let keys: Vec<u64> = rows.iter().map(|&row| pictures.keys()[row]).collect();
        let mut walk = Self {
            attack,
            views: Vec::new(),
            size,
            ball: Ball::new(&clean, attack.eps)?,
            pixels: clean.clone(),
            velocity: None,
            bounds: vec![Window::whole(size); rows.len()],
            clean_loss: Vec::new(),
            rows,
            keys,
        };
        let whole = vec![Window::whole(size); walk.rows.len()];
        for (surrogate, loss) in surrogates.iter().zip(losses) {
            let mut view = View { surrogate, loss, clean: Vec::new(), now: Vec::new(), ties: Vec::new() };
            let (shown, _) = view.show(&clean, &whole)?;
            (view.clean, view.ties) = loss.localise(&shown, &walk.rows)?;
            if !attack.mask_from_crops {
                view.ties.clear();
            }
            view.now = view.clean.clone();
            walk.views.push(view);
        }
        walk.find_bounds();
        walk.clean_loss = walk.whole_loss()?;
        if attack.random_start {
            let noise = match &drawn.noise {
                Some(noise) => select(&noise.to_device(clean.device())?.contiguous()?, &walk.rows)?,
                None => {
                    let each = clean.elem_count() / walk.rows.len();
                    let draw = |&key: &u64| uniform(&mut picture_rng(seed, key, 0, "v-attack start"), each);
                    let noise: Vec<f32> = walk.keys.iter().flat_map(draw).collect();
                    Tensor::from_vec(noise, clean.shape(), clean.device())?
                }
            };
            walk.pixels = (&clean + (noise * attack.alpha)?)?;
        }
        Ok(walk)
    }

    /// The boxes of the present soft maps, their mean where there are several surrogates.
    fn find_bounds(&mut self) {
        let Crop::Centric { share, .. } = self.attack.crop else { return };
        for (i, bounds) in self.bounds.iter_mut().enumerate() {
            let mut soft = self.views[0].now[i].soft(self.size);
            for view in self.views.iter().skip(1) {
                soft.iter_mut().zip(view.now[i].soft(self.size)).for_each(|(sum, more)| *sum += more);
            }
            *bounds = mask::bounds(&soft, self.size, share);
        }
    }

    /// The losses of the whole pictures under the clean ones' masks.
    fn whole_loss(&self) -> Result<Vec<f64>> {
        let mut sum = vec![0.0; self.rows.len()];
        let whole = vec![Window::whole(self.size); self.rows.len()];
        for view in &self.views {
            let masks: Vec<Vec<bool>> = view.clean.iter().map(|found| found.mask.clone()).collect();
            let (shown, _) = view.show(&self.pixels, &whole)?;
            let found = view.loss.values_of(&shown, &self.rows, &masks)?;
            sum.iter_mut().zip(found).for_each(|(sum, loss)| *sum += view.surrogate.weight() * loss);
        }
        Ok(sum)
    }

    fn run(
        &mut self,
        seed: u64,
        drawn: &Drawn,
        finished: &mut Finished,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<()> {
        let steps = self.attack.steps;
        let draw = |key: &u64| picture_rng(seed, *key, 0, "v-attack crop");
        let mut chances: Vec<_> = self.keys.iter().map(draw).collect();
        for step in 0..steps {
            let windows: Vec<Window> = match &drawn.windows {
                Some(windows) => vec![windows[step]; self.rows.len()],
                None => {
                    let draw = |(chance, bounds)| self.attack.crop.draw(self.size, bounds, chance);
                    chances.iter_mut().zip(&self.bounds).map(draw).collect()
                }
            };
            let nan = self.step(&windows)?;
            for (&row, count) in self.rows.iter().zip(nan) {
                finished.outcomes[row].gradients += 1;
                finished.outcomes[row].nan_gradients += count;
            }
            progress(&Progress { step: step + 1, steps, active: self.rows.len(), fooled: None });
        }
        self.pixels = self.ball.project(&self.pixels)?;
        let losses = self.whole_loss()?;
        for (i, &row) in self.rows.iter().enumerate() {
            finished.pixels[row] = self.pixels.narrow(0, i, 1)?.force_contiguous()?;
            let outcome = &mut finished.outcomes[row];
            outcome.attacked = true;
            outcome.clean_loss = Some(self.clean_loss[i]);
            outcome.loss = Some(losses[i]);
        }
        Ok(())
    }

    /// One step on these crops; says how many entries of each gradient were NaN.
    fn step(&mut self, windows: &[Window]) -> Result<Vec<u64>> {
        let mut sum: Option<Vec<Tensor>> = None;
        let mut nans = vec![0; self.rows.len()];
        for view in &mut self.views {
            let (shown, resizes) = view.show(&self.pixels, windows)?;
            let masks = view.masks(self.size, windows);
            let ties = self.attack.mask_from_crops.then_some(&view.ties[..]);
            let (_, gradient, found) = view.loss.step(&shown, &self.rows, &masks, ties)?;
            if let Some(found) = found {
                view.now = found;
            }
            let (gradient, nan) = without_nan(&gradient)?;
            nans.iter_mut().zip(nan).for_each(|(sum, n)| *sum += n);
            let gradient = (gradient * view.surrogate.weight())?;
            let parts = windows.iter().zip(&resizes).enumerate().map(|(i, (window, resize))| {
                let one = gradient.narrow(0, i, 1)?;
                match self.attack.resize_signs {
                    true => Ok(one),
                    false => window.place(&resize.adjoint(&one)?, self.size),
                }
            });
            let parts = parts.collect::<Result<Vec<_>>>()?;
            sum = Some(match sum {
                None => parts,
                Some(before) => {
                    let added = before.iter().zip(&parts).map(|(a, b)| Ok((a + b)?));
                    added.collect::<Result<_>>()?
                }
            });
        }
        if self.attack.mask_from_crops {
            self.find_bounds();
        }
        let Some(gradients) = sum else { return Ok(nans) };
        let mut direction = Tensor::cat(&gradients, 0)?;
        if self.attack.momentum > 0.0 {
            let scale = (direction.abs()?.mean_keepdim((1, 2, 3))? + f64::from(f32::MIN_POSITIVE))?;
            direction = direction.broadcast_div(&scale)?;
            if let Some(velocity) = &self.velocity {
                direction = ((velocity * self.attack.momentum)? + direction)?;
            }
            self.velocity = Some(direction.clone());
        }
        let mut moves = (direction.sign()? * self.attack.alpha)?;
        if self.attack.resize_signs {
            let moved = windows.iter().enumerate().map(|(i, window)| {
                let one = moves.narrow(0, i, 1)?;
                let resize = Resize::plain(size(&one)?, (window.height, window.width), one.device())?;
                window.place(&resize.apply(&one)?, self.size)
            });
            moves = Tensor::cat(&moved.collect::<Result<Vec<_>>>()?, 0)?;
        }
        self.pixels = self.ball.project(&(&self.pixels + moves)?)?;
        Ok(nans)
    }
}
