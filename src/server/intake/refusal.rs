//! Why a picture was not taken.

use std::fmt;

/// The reason a picture was refused for; [`Refusal::as_str`] is its label in metrics.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Not a `data:` or `https:` URL: another scheme, or none (a path).
    Scheme,
    /// A URL that is malformed, holds credentials or control characters, or is too long.
    BadUrl,
    /// The payload of a `data:` URL is not strict base64.
    BadBase64,
    /// An `https:` URL where fetching is off.
    FetchDisabled,
    /// The host is not on the allow-list.
    HostNotAllowed,
    /// The port is not allowed.
    PortNotAllowed,
    /// The host is, or its name stands for, an address that is not public.
    PrivateAddress,
    /// The host's name stands for no address.
    Unresolved,
    /// No connection, or it broke off before an answer.
    Unreachable,
    /// No trusted TLS connection.
    Tls,
    /// The host answered, but with another status than 200 or a redirect.
    UpstreamStatus,
    /// The host's answer is not proper HTTP, or it broke off.
    UpstreamBroken,
    /// More redirects than allowed, as in a loop.
    TooManyRedirects,
    /// A time limit passed.
    Timeout,
    /// More bytes than allowed.
    TooLarge,
    /// More pixels than allowed.
    TooManyPixels,
    /// Decoding would need more memory than allowed.
    TooMuchMemory,
    /// Not a complete picture of a known format.
    NotAPicture,
    /// The server has no room for it now.
    Busy,
}

impl Refusal {
    /// All reasons, for a server that shows a count of each from its start.
    pub const ALL: &[Self] = &[
        Self::Scheme,
        Self::BadUrl,
        Self::BadBase64,
        Self::FetchDisabled,
        Self::HostNotAllowed,
        Self::PortNotAllowed,
        Self::PrivateAddress,
        Self::Unresolved,
        Self::Unreachable,
        Self::Tls,
        Self::UpstreamStatus,
        Self::UpstreamBroken,
        Self::TooManyRedirects,
        Self::Timeout,
        Self::TooLarge,
        Self::TooManyPixels,
        Self::TooMuchMemory,
        Self::NotAPicture,
        Self::Busy,
    ];

    /// A stable label for metrics and logs. Not for the asker: `unresolved` and `private_address`
    /// would tell which names exist inside.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Scheme => "scheme",
            Self::BadUrl => "bad_url",
            Self::BadBase64 => "bad_base64",
            Self::FetchDisabled => "fetch_disabled",
            Self::HostNotAllowed => "host_not_allowed",
            Self::PortNotAllowed => "port_not_allowed",
            Self::PrivateAddress => "private_address",
            Self::Unresolved => "unresolved",
            Self::Unreachable => "unreachable",
            Self::Tls => "tls",
            Self::UpstreamStatus => "upstream_status",
            Self::UpstreamBroken => "upstream_broken",
            Self::TooManyRedirects => "too_many_redirects",
            Self::Timeout => "timeout",
            Self::TooLarge => "too_large",
            Self::TooManyPixels => "too_many_pixels",
            Self::TooMuchMemory => "too_much_memory",
            Self::NotAPicture => "not_a_picture",
            Self::Busy => "busy",
        }
    }

    /// The HTTP status to answer with: 400, 413 over a limit, 429 when busy.
    ///
    /// OpenAI's clients ask again by themselves after 408, 409, 429 and 5xx; a picture that was
    /// refused once will be refused again, so of these only `busy` is one.
    pub fn status(self) -> u16 {
        match self {
            Self::TooLarge | Self::TooManyPixels | Self::TooMuchMemory => 413,
            Self::Busy => 429,
            _ => 400,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A picture that was not taken. Its message is for the asker: it names neither addresses nor what
/// a host answered.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct IntakeError {
    /// Why.
    pub refusal: Refusal,
    /// What to tell the asker.
    pub message: String,
    detail: Option<String>,
}

impl IntakeError {
    pub(super) fn new(refusal: Refusal, label: &str, reason: impl fmt::Display) -> Self {
        Self { refusal, message: format!("picture `{label}`: {reason}"), detail: None }
    }

    pub(super) fn with_detail(mut self, detail: impl fmt::Display) -> Self {
        self.detail = Some(detail.to_string());
        self
    }

    /// What more is known, addresses among it: for the server's log, never for the asker.
    pub fn detail(&self) -> Option<&str> {
        self.detail.as_deref()
    }
}
