use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Error, Result};

/// The radius of the ball |x' - x|, in pixel units of [0, 1]; written `4/255` or `0.0157`, and
/// printed as it was written.
///
/// Two are equal if their values are. In JSON it is the string.
#[derive(Debug, Clone, Copy)]
pub struct Eps {
    numerator: f64,
    /// `None` for a decimal number.
    denominator: Option<f64>,
}

/// How far a picture may lie outside a ball for f32's sake.
pub(super) const TOLERANCE: f64 = 1e-6;

impl Eps {
    /// From a number in [0, 1].
    ///
    /// # Errors
    /// If it is not.
    pub fn new(value: f64) -> Result<Self> {
        Self { numerator: value, denominator: None }.checked(value)
    }

    /// `n` steps of an 8-bit picture: n/255.
    pub const fn of_255(n: u8) -> Self {
        Self { numerator: n as f64, denominator: Some(255.0) }
    }

    /// In pixel units of [0, 1].
    pub fn value(self) -> f64 {
        self.numerator / self.denominator.unwrap_or(1.0)
    }

    /// Whole steps of an 8-bit picture inside the ball: floor(255 eps), where an eps within 1e-6
    /// of k/255 counts as k/255.
    pub fn steps(self) -> u8 {
        ((self.value() + TOLERANCE) * 255.0).floor().min(255.0) as u8
    }

    fn checked(self, found: impl ToString) -> Result<Self> {
        let range = 0.0..=1.0;
        if self.denominator.is_none_or(|d| d.is_finite() && d > 0.0) && range.contains(&self.value()) {
            // -0 would be printed as such.
            return Ok(Self { numerator: self.numerator.abs(), ..self });
        }
        Err(Error::argument("eps", "0 to 1 in pixel units, such as 4/255 or 0.0157", found))
    }
}

impl PartialEq for Eps {
    fn eq(&self, other: &Self) -> bool {
        self.value() == other.value()
    }
}

impl PartialOrd for Eps {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        self.value().partial_cmp(&other.value())
    }
}

impl fmt::Display for Eps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.numerator)?;
        self.denominator.map_or(Ok(()), |denominator| write!(f, "/{denominator}"))
    }
}

impl FromStr for Eps {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |part: &str| part.trim().parse::<f64>().unwrap_or(f64::NAN);
        match text.split_once('/') {
            Some((over, under)) => {
                Self { numerator: number(over), denominator: Some(number(under)) }.checked(text)
            }
            None => Self { numerator: number(text), denominator: None }.checked(text),
        }
    }
}

impl Serialize for Eps {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Eps {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
