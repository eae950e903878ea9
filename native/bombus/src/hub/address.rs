//! Addresses: what they are made of, where redirects lead, and what of them may be shown.

use crate::error::{Error, Result};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ureq::http::Uri;

/// What may stand in a part of a path as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

pub fn encoded(part: &str) -> String {
    utf8_percent_encode(part, PLAIN).to_string()
}

pub fn uri(url: &str) -> Result<Uri> {
    let invalid = || Error::Server("the Hub's address is no valid URL: check HF_ENDPOINT".into());
    url.parse().ok().filter(is_http).ok_or_else(invalid)
}

fn is_http(uri: &Uri) -> bool {
    matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some()
}

/// The address that a `Location` means (RFC 3986, 5.2).
pub fn joined(base: &Uri, location: &str) -> Option<Uri> {
    let scheme = base.scheme_str()?;
    let (before, _) = location.split_at(location.find(['/', '?', '#']).unwrap_or(location.len()));
    if before.contains(':') {
        return location.parse().ok().filter(is_http);
    }
    if location.starts_with("//") {
        return format!("{scheme}:{location}").parse().ok();
    }
    let location = location.split('#').next()?;
    let (path, query) = location.split_at(location.find('?').unwrap_or(location.len()));
    let folder = base.path().rsplit_once('/').map_or("", |(folder, _file)| folder);
    let path = match path {
        "" => base.path().to_owned(),
        path if path.starts_with('/') => without_dots(path),
        path => without_dots(&format!("{folder}/{path}")),
    };
    format!("{scheme}://{}{path}{query}", base.authority()?).parse().ok()
}

/// A path without its parts `.` and `..`.
fn without_dots(path: &str) -> String {
    let mut parts: Vec<&str> = vec![];
    for part in path.split('/').skip(1) {
        match part {
            "." => {}
            ".." => _ = parts.pop(),
            part => parts.push(part),
        }
    }
    let folder = if path.ends_with("/.") || path.ends_with("/..") { "/" } else { "" };
    format!("/{}{folder}", parts.join("/"))
}

pub fn is_same_origin(one: &Uri, other: &Uri) -> bool {
    let origin = |uri: &Uri| {
        let scheme = uri.scheme_str()?.to_owned();
        let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
        Some((scheme, uri.host()?.to_ascii_lowercase(), port))
    };
    origin(one).is_some() && origin(one) == origin(other)
}

/// Where a person looks at a repository; without the password that the endpoint may have.
pub fn page(endpoint: &Uri, id: &str) -> String {
    let port = endpoint.port().map_or(String::new(), |port| format!(":{port}"));
    let scheme = endpoint.scheme_str().unwrap_or("https");
    let path = endpoint.path().trim_end_matches('/');
    format!("{scheme}://{}{port}{path}/{id}", host(endpoint))
}

/// For messages: no path (which may be signed), no password.
pub fn host(url: &Uri) -> &str {
    url.host().unwrap_or("the Hub")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_followed_as_a_browser_does() {
        let base = uri("http://hub:1234/a/b?x=1").unwrap();
        let next = |location: &str| joined(&base, location).map(|uri| uri.to_string());
        assert_eq!(next("/c/d").as_deref(), Some("http://hub:1234/c/d"));
        assert_eq!(next("c?y=2").as_deref(), Some("http://hub:1234/a/c?y=2"));
        assert_eq!(next("?y=2").as_deref(), Some("http://hub:1234/a/b?y=2"));
        assert_eq!(next("./../../c/./d").as_deref(), Some("http://hub:1234/c/d"));
        assert_eq!(next("/c?z=http://x").as_deref(), Some("http://hub:1234/c?z=http://x"));
        assert_eq!(next("ftp://x/y"), None);
        assert_eq!(next("mailto:x"), None);
        assert_eq!(next("https://cdn/x").as_deref(), Some("https://cdn/x"));
        assert_eq!(next("//cdn/x").as_deref(), Some("http://cdn/x"));
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let same =
            |one: &str, other: &str| is_same_origin(&uri(one).unwrap(), &uri(other).unwrap());
        assert!(same("https://hub/a", "https://HUB:443/b"));
        assert!(!same("https://hub/a", "http://hub/a"));
        assert!(!same("http://hub:1/a", "http://hub:2/a"));
        assert!(!same("http://hub/a", "http://hub.evil/a"));
        assert!(!same("http://hub/a", "http://hub@evil/a"));
    }
}
