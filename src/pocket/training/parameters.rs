//! Named weights that learn, their AdamW moments, and both on disk.

use std::collections::HashMap;
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::{Error, Result};

/// How one step changes the weights: AdamW (Loshchilov and Hutter, arXiv 1711.05101).
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay of every matrix (not of vectors).
    pub weight_decay: f64,
    /// The largest norm of all gradients together; longer ones are scaled down to it.
    pub clip: f64,
}

/// Named f32 weights in a fixed order, with what AdamW remembers of each.
pub struct Parameters {
    names: Vec<String>,
    index: HashMap<String, usize>,
    shapes: Vec<Vec<usize>>,
    values: Vec<Vec<f32>>,
    first: Vec<Vec<f32>>,
    second: Vec<Vec<f32>>,
    rng: ChaCha8Rng,
}

/// The gradients of every weight, in the order of [`Parameters::names`].
pub type Gradients = Vec<Vec<f32>>;

/// Some weights as leaves of candle's graph.
pub struct Leaves(HashMap<String, Var>);

impl Leaves {
    /// The leaf `name`.
    ///
    /// # Errors
    /// If there is none.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.0.get(name).map(Var::as_tensor).ok_or_else(|| missing(name))
    }

    /// Adds the leaves' gradients out of a backward pass to those of all weights.
    ///
    /// # Errors
    /// If candle refuses.
    pub fn add(&self, p: &Parameters, store: &GradStore, gradients: &mut Gradients) -> Result<()> {
        for (name, leaf) in &self.0 {
            if let Some(gradient) = store.get(leaf) {
                let gradient: Vec<f32> = gradient.flatten_all()?.to_vec1()?;
                gradients[p.place(name)?].iter_mut().zip(gradient).for_each(|(a, b)| *a += b);
            }
        }
        Ok(())
    }
}

fn missing(name: &str) -> Error {
    Error::MissingWeight { file: "the weights in training".into(), name: name.to_string() }
}

impl Parameters {
    /// None yet; initial values are drawn from `seed` in the order they are asked for.
    pub fn new(seed: u64) -> Self {
        Self {
            names: Vec::new(),
            index: HashMap::new(),
            shapes: Vec::new(),
            values: Vec::new(),
            first: Vec::new(),
            second: Vec::new(),
            rng: ChaCha8Rng::seed_from_u64(seed),
        }
    }

    /// The names in order.
    #[cfg(test)]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Adds a weight with given values.
    pub fn add(&mut self, name: &str, values: Vec<f32>, shape: &[usize]) {
        self.index.insert(name.to_string(), self.names.len());
        self.names.push(name.to_string());
        self.shapes.push(shape.to_vec());
        self.first.push(vec![0.0; values.len()]);
        self.second.push(vec![0.0; values.len()]);
        self.values.push(values);
    }

    /// Adds a weight of one value.
    pub fn constant(&mut self, name: &str, value: f32, shape: &[usize]) {
        self.add(name, vec![value; shape.iter().product()], shape);
    }

    /// Adds a weight drawn from a normal distribution.
    pub fn normal(&mut self, name: &str, std: f64, shape: &[usize]) {
        let n = shape.iter().product();
        // Box and Muller, so that the values hang on the generator's integers alone.
        let mut uniform = || (f64::from(self.rng.next_u32()) + 0.5) / 4_294_967_296.0;
        let mut draw = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
        let values = (0..n).map(|_| (draw() * std) as f32).collect();
        self.add(name, values, shape);
    }

    /// The place of the weight `name` in the order.
    ///
    /// # Errors
    /// If there is none.
    pub fn place(&self, name: &str) -> Result<usize> {
        self.index.get(name).copied().ok_or_else(|| missing(name))
    }

    /// The values of the weight at `place`.
    pub fn values(&self, place: usize) -> &[f32] {
        &self.values[place]
    }

    /// The values of the weight `name`.
    ///
    /// # Errors
    /// If there is none.
    pub fn get(&self, name: &str) -> Result<&[f32]> {
        Ok(&self.values[self.place(name)?])
    }

    /// Gradients of zero.
    pub fn zeros(&self) -> Gradients {
        self.values.iter().map(|values| vec![0.0; values.len()]).collect()
    }

    /// The weights for which `which` holds, as leaves of a graph.
    ///
    /// # Errors
    /// If candle refuses.
    pub fn leaves(&self, which: impl Fn(&str) -> bool) -> Result<Leaves> {
        let mut leaves = HashMap::new();
        for (i, name) in self.names.iter().enumerate().filter(|(_, name)| which(name)) {
            let values = Tensor::from_slice(&self.values[i], self.shapes[i].as_slice(), &Device::Cpu)?;
            leaves.insert(name.clone(), Var::from_tensor(&values)?);
        }
        Ok(Leaves(leaves))
    }

    /// Step `step` (the first is 1) against `gradients`, with learning rate `rate`. Returns the
    /// norm of the gradients before clipping.
    pub fn step(&mut self, gradients: &Gradients, step: u64, rate: f64, adam: &AdamW) -> f64 {
        let norm = gradients.iter().flatten().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let scale = if norm > adam.clip { adam.clip / norm } else { 1.0 } as f32;
        let (b1, b2) = (adam.beta1 as f32, adam.beta2 as f32);
        let unbias1 = 1.0 - adam.beta1.powf(step as f64);
        let unbias2 = (1.0 - adam.beta2.powf(step as f64)).sqrt();
        let (rate1, eps) = ((rate / unbias1 * unbias2) as f32, (adam.eps * unbias2) as f32);
        for (i, values) in self.values.iter_mut().enumerate() {
            let keep = if self.shapes[i].len() >= 2 { 1.0 - (rate * adam.weight_decay) as f32 } else { 1.0 };
            let moments = self.first[i].iter_mut().zip(self.second[i].iter_mut());
            for ((w, (m, v)), g) in values.iter_mut().zip(moments).zip(&gradients[i]) {
                let g = g * scale;
                *m = b1 * *m + (1.0 - b1) * g;
                *v = b2 * *v + (1.0 - b2) * g * g;
                *w = *w * keep - rate1 * *m / (v.sqrt() + eps);
            }
        }
        norm
    }

    /// Holds a weight's values at or under `most`.
    ///
    /// # Errors
    /// If there is no such weight.
    pub fn clamp(&mut self, name: &str, most: f32) -> Result<()> {
        let place = self.place(name)?;
        self.values[place].iter_mut().for_each(|value| *value = value.min(most));
        Ok(())
    }

    /// Writes weights and moments, whole or not at all.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: &Path, step: u64) -> Result<()> {
        let mut parts = Vec::new();
        for (i, name) in self.names.iter().enumerate() {
            let kinds = [("weight", &self.values[i]), ("first", &self.first[i]), ("second", &self.second[i])];
            for (kind, values) in kinds {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                parts.push((format!("{kind}:{name}"), self.shapes[i].clone(), bytes));
            }
        }
        let views = parts
            .iter()
            .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
            .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(candle_core::Error::wrap)?;
        let metadata = HashMap::from([("step".to_string(), step.to_string())]);
        let bytes = safetensors::serialize(views, Some(metadata)).map_err(candle_core::Error::wrap)?;
        super::write_whole(path, &bytes)
    }

    /// Takes weights and moments from a file that [`Parameters::save`] wrote; returns its step.
    ///
    /// # Errors
    /// If the file is no such file, or of other weights.
    pub fn load(&mut self, path: &Path) -> Result<u64> {
        let bytes = std::fs::read(path).map_err(|e| Error::read(path, e))?;
        let fail = |e: &dyn std::fmt::Display| Error::config(path, format!("not a training state: {e}"));
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| fail(&e))?;
        let step = header.metadata().as_ref().and_then(|m| m.get("step")).and_then(|s| s.parse().ok());
        let step = step.ok_or_else(|| fail(&"no step in its metadata"))?;
        let file = safetensors::SafeTensors::deserialize(&bytes).map_err(|e| fail(&e))?;
        let read = |kind: &str, name: &str, shape: &[usize]| -> Result<Vec<f32>> {
            let view = file.tensor(&format!("{kind}:{name}")).map_err(|e| fail(&e))?;
            if view.shape() != shape || view.dtype() != Dtype::F32 {
                return Err(fail(&format!("`{name}` is {:?}, expected {shape:?}", view.shape())));
            }
            Ok(view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        for i in 0..self.names.len() {
            let (name, shape) = (&self.names[i], &self.shapes[i]);
            self.values[i] = read("weight", name, shape)?;
            self.first[i] = read("first", name, shape)?;
            self.second[i] = read("second", name, shape)?;
        }
        Ok(step)
    }

    /// The weights in half precision under the names that `rename` gives, in order.
    pub fn halves(&self, rename: impl Fn(&str) -> String) -> Vec<(String, Vec<usize>, Vec<u8>)> {
        let half = |(i, name): (usize, &String)| {
            let bytes = self.values[i].iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
            (rename(name), self.shapes[i].clone(), bytes)
        };
        self.names.iter().enumerate().map(half).collect()
    }
}
