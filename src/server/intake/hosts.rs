//! Which URLs may be fetched: syntax, scheme, host and port.

use url::{Host, Url};

use super::address::is_public;
use super::{IntakeError, Refusal};
use crate::{Error, Result};

/// The longest URL that is fetched, in bytes.
const MAX_URL: usize = 4096;

/// The allow-list.
#[derive(Debug)]
pub struct Hosts {
    rules: Vec<Rule>,
    ports: Vec<u16>,
}

#[derive(Debug, PartialEq)]
enum Rule {
    Any,
    Exactly(Host),
    /// All names below this one, at any depth.
    Below(String),
}

impl Hosts {
    /// Reads a list of hosts (`example.org`, `*.example.org`, a public address, or `*` for all) and
    /// of ports.
    pub fn new(hosts: &[String], ports: &[u16]) -> Result<Self> {
        if hosts.is_empty() {
            return Err(Error::argument("allowed picture hosts", "at least one, or `*` for any", "none"));
        }
        if ports.is_empty() || ports.contains(&0) {
            return Err(Error::argument(
                "allowed picture ports",
                "at least one, from 1 to 65535",
                format!("{ports:?}"),
            ));
        }
        let rules = hosts.iter().map(|host| rule(host)).collect::<Result<_>>()?;
        Ok(Self { rules, ports: ports.to_vec() })
    }

    fn allow(&self, host: &Host) -> bool {
        self.rules.iter().any(|rule| match (rule, host) {
            (Rule::Any, _) => true,
            (Rule::Exactly(only), host) => only == host,
            (Rule::Below(parent), Host::Domain(name)) => name
                .strip_suffix(parent.as_str())
                .is_some_and(|below| below.len() > 1 && below.ends_with('.')),
            (Rule::Below(_), _) => false,
        })
    }
}

fn rule(text: &str) -> Result<Rule> {
    let wrong = |expected: &str| Error::argument("allowed picture host", expected, format!("`{text}`"));
    let expected = "a name like `example.org` or `*.example.org`, a public address, or `*`";
    if text == "*" {
        return Ok(Rule::Any);
    }
    let (below, name) = match text.strip_prefix("*.") {
        Some(name) => (true, name),
        None => (false, text),
    };
    let address = name.parse().map(|ip| match ip {
        std::net::IpAddr::V4(ip) => Host::Ipv4(ip),
        std::net::IpAddr::V6(ip) => Host::Ipv6(ip),
    });
    let host = match address {
        Ok(host) => host,
        Err(_) => {
            canonical(Host::parse(name).map_err(|_| wrong(expected))?).ok_or_else(|| wrong(expected))?
        }
    };
    match (below, host) {
        (true, Host::Domain(name)) => Ok(Rule::Below(name)),
        (true, _) => Err(wrong(expected)),
        (false, Host::Ipv4(ip)) if !is_public(ip.into()) => Err(wrong("a public address")),
        (false, Host::Ipv6(ip)) if !is_public(ip.into()) => Err(wrong("a public address")),
        (false, host) => Ok(Rule::Exactly(host)),
    }
}

/// A host with the dot at its end taken off; `None` if it is no name that the internet has.
fn canonical(host: Host) -> Option<Host> {
    let Host::Domain(name) = host else { return Some(host) };
    let name = name.strip_suffix('.').unwrap_or(&name);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_'))
    };
    (name.len() <= 253 && name.split('.').all(label)).then(|| Host::Domain(name.to_owned()))
}

/// One hop: where to ask, and for what.
#[derive(Debug)]
pub struct Target {
    pub url: Url,
    pub host: Host,
    pub port: u16,
}

impl Target {
    /// The `Host` field.
    pub fn authority(&self) -> String {
        if self.port == 443 { self.host.to_string() } else { format!("{}:{}", self.host, self.port) }
    }

    /// Path and query as they are asked for; no fragment.
    pub fn path(&self) -> String {
        match self.url.query() {
            Some(query) => format!("{}?{query}", self.url.path()),
            None => self.url.path().to_owned(),
        }
    }
}

/// The scheme of a URL, in lower case, if there is one in the syntax of RFC 3986.
pub fn scheme(url: &str) -> Option<String> {
    let (scheme, _) = url.get(..url.len().min(64)).unwrap_or(url).split_once(':')?;
    let mut bytes = scheme.bytes();
    (bytes.next()?.is_ascii_alphabetic()
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.')))
    .then(|| scheme.to_ascii_lowercase())
}

/// Checks a URL, or where a redirect from `base` leads.
pub fn target(
    text: &str,
    base: Option<&Url>,
    hosts: &Hosts,
    label: &str,
) -> std::result::Result<Target, IntakeError> {
    let bad = |reason: &str| IntakeError::new(Refusal::BadUrl, label, reason);
    if text.len() > MAX_URL {
        return Err(bad("its URL is too long"));
    }
    // Parsers disagree about these: they strip, turn or keep them.
    if text.chars().any(|c| c.is_control() || c.is_whitespace() || c == '\\') {
        return Err(bad("its URL has spaces, control characters or backslashes; write them as %20"));
    }
    match (scheme(text).as_deref(), base) {
        (Some("https"), _) => {
            let rest = &text["https:".len()..];
            if !rest.starts_with("//") || rest.starts_with("///") {
                return Err(bad("its URL is malformed; expected `https://host/...`"));
            }
        }
        (None, Some(_)) => {}
        _ => return Err(other_scheme(label)),
    }
    // A user's name that is empty is not seen once the URL is parsed.
    if let Some((_, rest)) = text.split_once("//")
        && scheme(text).is_some() | text.starts_with("//")
        && rest.split(['/', '?', '#']).next().unwrap_or_default().contains('@')
    {
        return Err(bad("its URL has credentials, which are not sent"));
    }
    let parsed = match base {
        Some(base) => base.join(text),
        None => Url::parse(text),
    };
    let mut url = parsed.map_err(|_| bad("its URL is malformed; expected `https://host/...`"))?;
    if url.scheme() != "https" {
        return Err(other_scheme(label));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("its URL has credentials, which are not sent"));
    }
    url.set_fragment(None);
    let host = url.host().map(|host| host.to_owned()).and_then(canonical);
    let host = host.ok_or_else(|| bad("its URL has no proper host"))?;
    let port = url.port_or_known_default().unwrap_or(443);
    if !hosts.allow(&host) {
        return Err(IntakeError::new(
            Refusal::HostNotAllowed,
            label,
            "its host is not one this server fetches from",
        )
        .with_detail(&host));
    }
    if !hosts.ports.contains(&port) {
        return Err(IntakeError::new(
            Refusal::PortNotAllowed,
            label,
            "its port is not one this server fetches from",
        )
        .with_detail(port));
    }
    Ok(Target { url, host, port })
}

pub fn other_scheme(label: &str) -> IntakeError {
    IntakeError::new(
        Refusal::Scheme,
        label,
        "expected a `data:` or `https:` URL; files and other schemes are never read",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(list: &[&str]) -> Result<Hosts> {
        Hosts::new(&list.iter().map(ToString::to_string).collect::<Vec<_>>(), &[443])
    }

    #[test]
    fn rules_mean_what_they_say() {
        let list =
            hosts(&["Example.org.", "*.pics.example.net", "bücher.example", "8.8.8.8", "[2606:4700::1]"])
                .unwrap();
        let allowed =
            |url: &str| target(url, None, &list, "p").map(|t| t.host.to_string()).map_err(|e| e.refusal);
        for (url, host) in [
            ("https://example.org/a", "example.org"),
            ("HTTPS://EXAMPLE.ORG./a", "example.org"),
            ("https://a.pics.example.net/", "a.pics.example.net"),
            ("https://a.b.pics.example.net/", "a.b.pics.example.net"),
            ("https://bücher.example/", "xn--bcher-kva.example"),
            ("https://134744072/", "8.8.8.8"),
            ("https://[2606:4700:0::1]/", "[2606:4700::1]"),
        ] {
            assert_eq!(allowed(url), Ok(host.to_string()), "{url}");
        }
        for url in [
            "https://pics.example.net/",
            "https://xpics.example.net/",
            "https://example.org.evil.com/",
            "https://evil-example.org/",
            "https://a.example.org/",
            "https://8.8.4.4/",
        ] {
            assert_eq!(allowed(url), Err(Refusal::HostNotAllowed), "{url}");
        }
        for wrong in [
            "",
            " ",
            "https://a.org",
            "a.org/x",
            "a.org:443",
            "*.",
            "*.*",
            "a.*.org",
            "*.8.8.8.8",
            "127.0.0.1",
            "::1",
            "0x7f.1",
            "a..b",
            "user@a.org",
        ] {
            assert!(hosts(&[wrong]).is_err(), "{wrong}");
        }
        assert!(hosts(&[]).is_err());
        assert!(Hosts::new(&["*".into()], &[]).is_err());
    }
}
