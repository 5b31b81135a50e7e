//! The library's one error type.

use std::path::PathBuf;

/// Everything that can go wrong in the library.
///
/// Messages are lower-case, name the file, flag or tensor concerned, and say what was expected
/// and what was found. [`Error::hint`] adds what the user may do about it, where that is known.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read `{}`: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write `{}`: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file or folder to be written is there already.
    #[error("cannot write `{}`: it exists already", path.display())]
    Exists {
        /// The file or folder.
        path: PathBuf,
        /// What the user may do.
        hint: String,
    },
    /// A run is a part of one.
    #[error("`{}`: expected a whole run, found shard {index} of {of}", path.display())]
    Shard {
        /// The run's folder or file.
        path: PathBuf,
        /// Which shard.
        index: usize,
        /// Of how many.
        of: usize,
    },
    /// A picture is over one of the limits of [`crate::image::DecodeLimits`].
    #[error("picture `{name}` has {found} {unit}, the limit is {limit}")]
    PictureTooLarge {
        /// The picture's file or name.
        name: String,
        /// What was counted: `bytes`, `pixels` or `bytes of memory`.
        unit: &'static str,
        /// How many it has.
        found: u64,
        /// How many it may have.
        limit: u64,
    },
    /// A picture could not be decoded.
    #[error("picture `{name}`: {reason}")]
    Picture {
        /// The picture's file or name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A configuration file is not what its model needs.
    #[error("`{}`: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// A model folder or Hub id could not be resolved.
    #[error("model `{model}`: {reason}")]
    Model {
        /// The id or folder as given.
        model: String,
        /// What is missing.
        reason: String,
    },
    /// A data set cannot be read as one.
    #[error("data `{}`: {reason}", path.display())]
    Data {
        /// The file or folder.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// A weight is missing from a checkpoint.
    #[error("`{}`: weight `{name}` is missing", file.display())]
    MissingWeight {
        /// The checkpoint.
        file: PathBuf,
        /// The tensor's name.
        name: String,
    },
    /// A weight has another shape than the configuration says.
    #[error("`{}`: weight `{name}` has shape {found:?}, expected {expected:?}", file.display())]
    WeightShape {
        /// The checkpoint.
        file: PathBuf,
        /// The tensor's name.
        name: String,
        /// The shape the configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// An anchor file is damaged or not an anchor.
    #[error("anchor `{}`: {reason}", path.display())]
    Anchor {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// An anchor does not belong to the tower it is put into.
    #[error("anchor does not fit this model: {reason}")]
    AnchorMismatch {
        /// What differs.
        reason: String,
        /// What the user may do.
        hint: String,
    },
    /// An argument is outside what a function takes.
    #[error("{what}: expected {expected}, found {found}")]
    Argument {
        /// The argument's or flag's name.
        what: String,
        /// What is allowed.
        expected: String,
        /// What was given.
        found: String,
    },
    /// Something this build or this model does not support.
    #[error("{0}")]
    Unsupported(String),
    /// The language model cannot take this conversation.
    #[error("conversation: {0}")]
    Conversation(String),
    /// The language model's engine failed.
    #[error("engine: {0}")]
    Engine(String),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// What the user may do about this error, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::AnchorMismatch { hint, .. } | Self::Exists { hint, .. } => Some(hint.clone()),
            Self::Shard { .. } => Some("join the shards first: `radapt eval merge`".into()),
            Self::PictureTooLarge { unit: "pixels", .. } => {
                Some("scale the picture down, or raise `--max-pixels`".into())
            }
            Self::PictureTooLarge { unit: "bytes", .. } => {
                Some("raise `--max-image-bytes` if this file is to be trusted".into())
            }
            Self::MissingWeight { .. } => {
                Some("the checkpoint is incomplete, or of another kind than config.json says".into())
            }
            _ => None,
        }
    }

    pub(crate) fn read(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Read { path: path.into(), source }
    }

    pub(crate) fn write(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Write { path: path.into(), source }
    }

    pub(crate) fn config(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Config { path: path.into(), reason: reason.into() }
    }

    pub(crate) fn data(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Data { path: path.into(), reason: reason.into() }
    }

    pub(crate) fn argument(
        what: impl Into<String>,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        Self::Argument { what: what.into(), expected: expected.into(), found: found.to_string() }
    }
}

/// The library's result type.
pub type Result<T> = std::result::Result<T, Error>;
