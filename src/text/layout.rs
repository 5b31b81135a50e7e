//! Where a checkpoint keeps its text encoder, and under which names.

use candle_core::{Device, Tensor};

use crate::tower::open_clip::{self, Source};
use crate::tower::weights::{Checkpoint, CheckpointAt, Weights};
use crate::{Error, Result};

const TOKENS: &str = "token_embedding.weight";

/// The text side of `checkpoint` under the names that transformers' `CLIPModel` has for it:
/// `text_model.*`, `text_projection.weight` and `logit_scale`.
///
/// # Errors
/// If the checkpoint holds no CLIP text encoder, more than one, or one of OpenCLIP's other designs.
pub fn text_weights<'a>(checkpoint: &'a Checkpoint, device: &Device) -> Result<Box<dyn Weights + 'a>> {
    let names = checkpoint.names().iter();
    let mut found: Vec<&str> = names
        .filter_map(|name| name.strip_suffix(TOKENS))
        .filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))
        .collect();
    found.sort_unstable();
    found.dedup();
    let prefix = match found[..] {
        [prefix] => prefix,
        [] => {
            return Err(Error::config(
                checkpoint.folder(),
                format!("no CLIP text encoder: no weight is called `...{TOKENS}`"),
            ));
        }
        _ => {
            let all = found.join(", ");
            return Err(Error::config(checkpoint.folder(), format!("more than one text encoder: {all}")));
        }
    };
    if let Some(text) = prefix.strip_suffix("embeddings.") {
        let root = text.strip_suffix("text_model.").unwrap_or(text);
        return Ok(Box::new(Transformers {
            text: checkpoint.at(text, device),
            root: checkpoint.at(root, device),
        }));
    }
    // Layer scale, CoCa's class token and a projection with bias: what they add would be left out.
    let other = ["transformer.resblocks.0.ls_1.gamma", "cls_emb", "text_projection.bias"];
    if let Some(name) =
        other.iter().map(|name| format!("{prefix}{name}")).find(|n| checkpoint.names().contains(n))
    {
        return Err(Error::config(
            checkpoint.label(),
            format!(
                "weight `{name}` is not part of CLIP's text encoder; this OpenCLIP design is not supported"
            ),
        ));
    }
    let root = prefix.strip_suffix("text.").unwrap_or(prefix);
    Ok(Box::new(OpenClip { text: checkpoint.at(prefix, device), root: checkpoint.at(root, device) }))
}

/// Names as they are, `text_model.` wherever it lies.
struct Transformers<'a> {
    text: CheckpointAt<'a>,
    root: CheckpointAt<'a>,
}

impl Transformers<'_> {
    fn place<'n>(&self, name: &'n str) -> (&CheckpointAt<'_>, &'n str) {
        match name.strip_prefix("text_model.") {
            Some(inner) => (&self.text, inner),
            None => (&self.root, name),
        }
    }
}

impl Weights for Transformers<'_> {
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let (place, name) = self.place(name);
        place.get(name, shape)
    }

    fn contains(&self, name: &str) -> bool {
        let (place, name) = self.place(name);
        place.contains(name)
    }
}

/// OpenAI's and OpenCLIP's names: queries, keys and values in one matrix, as PyTorch's
/// `MultiheadAttention` has them, and the text projection from the left.
struct OpenClip<'a> {
    text: CheckpointAt<'a>,
    root: CheckpointAt<'a>,
}

fn source(name: &str) -> Option<Source> {
    let inner = name.strip_prefix("text_model.").unwrap_or(name);
    let whole = |name: String| Some(Source::Whole(name));
    match inner {
        "text_projection.weight" => return Some(Source::Transposed("text_projection".into())),
        "embeddings.token_embedding.weight" => return whole("token_embedding.weight".into()),
        "embeddings.position_embedding.weight" => return whole("positional_embedding".into()),
        _ => {}
    }
    if let Some(kind) = inner.strip_prefix("final_layer_norm.") {
        return whole(format!("ln_final.{kind}"));
    }
    open_clip::block(inner)
}

impl Weights for OpenClip<'_> {
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        // OpenCLIP's newer text towers have a linear layer for a projection, as transformers has.
        if self.text.contains(name) {
            return self.text.get(name, shape);
        }
        match source(name) {
            Some(source) => source.get(&self.text, shape),
            None => self.root.get(name, shape),
        }
    }

    fn contains(&self, name: &str) -> bool {
        self.text.contains(name)
            || match source(name) {
                Some(source) => self.text.contains(source.name()),
                None => self.root.contains(name),
            }
    }
}
