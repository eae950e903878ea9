//! Questions to the Hub, and what its answers mean.
//!
//! Files are at `<endpoint>/<id>/resolve/<revision>/<path>`. The answer names the commit
//! (`X-Repo-Commit`), the hash (`X-Linked-Etag` or `ETag`: SHA-256 of large files, git's name of small
//! ones) and the size (`X-Linked-Size` or `Content-Length`), and mostly redirects to another host.
//! Errors are told apart by `X-Error-Code`. As in huggingface_hub's `file_download.py` and
//! `utils/_http.py`.

use super::watch::Watch;
use super::{Settings, Source};
use crate::error::{Error, Result};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};
use ureq::http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body};

/// A secret: never shown.
#[derive(Clone)]
pub struct Token(pub String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// What the Hub says of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    pub etag: String,
    pub size: Option<u64>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    Found(Found),
    /// The commit has no such file.
    Absent,
    /// It was not asked: the file is in the cache.
    Here,
}

/// Why an attempt failed, and whether there may be another.
pub struct Trouble {
    pub error: Error,
    pub again: Again,
    /// Some bytes came: it was not in vain.
    pub progress: bool,
}

pub enum Again {
    No,
    Soon,
    /// As the Hub says.
    After(Duration),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self { error, again: Again::No, progress: false }
    }
}

pub struct Client<'a> {
    settings: &'a Settings,
    source: &'a Source,
    pub watch: &'a Watch,
    endpoint: Uri,
    hasty: bool,
}

const ATTEMPTS: u32 = 5;
/// What the Hub may make us wait, all together: twice its window for counting requests.
const LONGEST_WAIT: Duration = Duration::from_secs(600);
const REDIRECTS: usize = 10;
/// After so long without a byte a connection counts as lost, as in huggingface_hub.
const SILENCE: Duration = Duration::from_secs(10);
/// How to give one, in messages.
const TOKEN: &str = "as auth_token: or HF_TOKEN (https://huggingface.co/settings/tokens)";

impl<'a> Client<'a> {
    /// `hasty`: nothing is tried twice.
    pub fn new(
        settings: &'a Settings,
        source: &'a Source,
        watch: &'a Watch,
        hasty: bool,
    ) -> Result<Self> {
        let endpoint = uri(&settings.endpoint)?;
        Ok(Self { settings, source, watch, endpoint, hasty })
    }

    /// Where a file is.
    pub fn url(&self, revision: &str, path: &str) -> Result<Uri> {
        let path: Vec<_> = path.split('/').map(encoded).collect();
        let (id, revision) = (&self.source.id, encoded(revision));
        uri(&format!("{}/{id}/resolve/{revision}/{}", self.settings.endpoint, path.join("/")))
    }

    /// The commit that the revision is, with what it says of this file.
    pub fn head_of_revision(&self, path: &str) -> Result<(String, Reply)> {
        let (commit, reply) = self.ask(&self.source.revision, path)?;
        match commit.filter(|commit| is_name(commit)) {
            Some(commit) => Ok((commit, reply)),
            None if reply == Reply::Absent => Err(self.not_there()),
            None => Err(self.no_hub("X-Repo-Commit")),
        }
    }

    pub fn head(&self, commit: &str, path: &str) -> Result<Reply> {
        Ok(self.ask(commit, path)?.1)
    }

    fn ask(&self, revision: &str, path: &str) -> Result<(Option<String>, Reply)> {
        let url = self.url(revision, path)?;
        self.patiently(|| {
            let response = self.request(Method::HEAD, url.clone(), 0, is_answered)?;
            let commit = header(response.headers(), "x-repo-commit").map(str::to_owned);
            if response.status().is_success() || response.status().is_redirection() {
                return Ok((commit, Reply::Found(self.found(&response)?)));
            }
            let code = header(response.headers(), "x-error-code");
            match response.status() == 404 && matches!(code, None | Some("EntryNotFound")) {
                true => Ok((commit, Reply::Absent)),
                false => Err(self.refused(&response)),
            }
        })
    }

    fn found(&self, response: &Response<Body>) -> Result<Found> {
        let headers = response.headers();
        let etag = header(headers, "x-linked-etag").or_else(|| header(headers, "etag"));
        let etag = etag.map(normalized).filter(|etag| is_name(etag));
        let length = header(headers, "content-length").filter(|_| response.status().is_success());
        Ok(Found {
            etag: etag.ok_or_else(|| self.no_hub("ETag"))?.to_owned(),
            size: header(headers, "x-linked-size").or(length).and_then(|size| size.parse().ok()),
        })
    }

    /// The names of all files of a commit.
    pub fn list(&self, commit: &str) -> Result<Vec<String>> {
        #[derive(serde::Deserialize)]
        struct Listing {
            siblings: Vec<Sibling>,
        }
        #[derive(serde::Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let (endpoint, id) = (&self.settings.endpoint, &self.source.id);
        let url = uri(&format!("{endpoint}/api/models/{id}/revision/{}", encoded(commit)))?;
        let listing: Listing = self.patiently(|| {
            let response = self.get(url.clone(), 0)?;
            serde_json::from_reader(response.into_body().into_reader()).map_err(|error| Trouble {
                error: Error::Server(format!("{}: no valid listing: {error}", self.name())),
                again: Again::Soon,
                progress: false,
            })
        })?;
        Ok(listing.siblings.into_iter().map(|sibling| sibling.rfilename).collect())
    }

    /// The bytes of a file, after the first `from`.
    pub fn get(&self, url: Uri, from: u64) -> Result<Response<Body>, Trouble> {
        let response = self.request(Method::GET, url, from, |_response| false)?;
        match response.status() {
            status if status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE => {
                Ok(response)
            }
            _ => Err(self.refused(&response)),
        }
    }

    /// Tries until it works, or will not.
    pub fn patiently<T>(&self, mut attempt: impl FnMut() -> Result<T, Trouble>) -> Result<T> {
        let (mut attempts, mut waited) = (0, Duration::ZERO);
        loop {
            self.watch.check()?;
            let trouble = match attempt() {
                Ok(value) => return Ok(value),
                Err(trouble) => trouble,
            };
            attempts = if trouble.progress { 1 } else { attempts + 1 };
            let pause = match trouble.again {
                Again::Soon => self.settings.pause * 2u32.pow(attempts - 1),
                Again::After(pause) => {
                    waited += pause;
                    pause
                }
                Again::No => return Err(trouble.error),
            };
            if self.hasty || attempts == ATTEMPTS || waited > LONGEST_WAIT {
                return Err(trouble.error);
            }
            self.watch.waiting(trouble.error.to_string(), pause);
            self.watch.sleep(pause)?;
        }
    }

    /// One request, with its redirects up to the answer that `is_enough`. The token goes to the
    /// endpoint alone.
    fn request(
        &self,
        method: Method,
        mut url: Uri,
        from: u64,
        is_enough: impl Fn(&Response<Body>) -> bool,
    ) -> Result<Response<Body>, Trouble> {
        for _redirect in 0..=REDIRECTS {
            let mut request = Request::builder().method(&method).uri(&url);
            if let Some(Token(token)) = &self.settings.token
                && is_same_origin(&url, &self.endpoint)
            {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header("range", format!("bytes={from}-"));
            }
            let response = request
                .body(())
                .map_err(ureq::Error::from)
                .and_then(|request| agent().run(request))
                .map_err(|error| self.unreachable(&url, error))?;
            let location = header(response.headers(), "location").map(str::to_owned);
            match location.filter(|_| response.status().is_redirection()) {
                Some(location) => {
                    let next = joined(&url, &location)
                        .ok_or_else(|| self.no_hub("a Location that can be followed"))?;
                    if !is_same_origin(&next, &url) && is_enough(&response) {
                        return Ok(response);
                    }
                    url = next;
                }
                // A signed address that is too old: another one comes from the endpoint.
                None if response.status().is_client_error()
                    && response.status() != StatusCode::RANGE_NOT_SATISFIABLE
                    && !is_same_origin(&url, &self.endpoint) =>
                {
                    let (host, status) = (host(&url), response.status().as_u16());
                    let error = Error::Server(format!("{}: {host} answered {status}", self.name()));
                    return Err(Trouble { error, again: Again::Soon, progress: false });
                }
                None => return Ok(response),
            }
        }
        Err(Error::Server(format!("{}: more than {REDIRECTS} redirects", self.name())).into())
    }

    /// "`owner/name` at huggingface.co"
    fn name(&self) -> String {
        format!("`{}` at {}", self.source.id, host(&self.endpoint))
    }

    fn no_hub(&self, what: &str) -> Error {
        let name = self.name();
        Error::Server(format!(
            "{name}: the answer has no {what}, as a Hub's has: check HF_ENDPOINT, proxies and firewalls"
        ))
    }

    fn not_there(&self) -> Error {
        let (name, rejected) = (self.name(), self.rejected());
        Error::NotFound(format!(
            "{name} is not there, or it is private and {rejected}: then give one {TOKEN}"
        ))
    }

    fn rejected(&self) -> &'static str {
        match self.settings.token {
            Some(_) => "the token that was sent is not accepted, or may not read it",
            None => "no token was sent",
        }
    }

    pub fn unreachable(&self, url: &Uri, error: ureq::Error) -> Trouble {
        let again = match error {
            ureq::Error::Tls(_) | ureq::Error::Rustls(_) => Again::No,
            _ => Again::Soon,
        };
        let (name, host) = (self.name(), host(url));
        let message = format!("{name}: no connection with {host}: {error}");
        Trouble { error: Error::NoNetwork(message), again, progress: false }
    }

    /// What an answer means that is none of those that were hoped for.
    fn refused(&self, response: &Response<Body>) -> Trouble {
        let Source { id, revision, .. } = self.source;
        let (name, endpoint) = (self.name(), &self.settings.endpoint);
        let rejected = self.rejected();
        let wait = told_to_wait(response.headers(), SystemTime::now());
        let status = response.status().as_u16();
        let (error, again) = match (status, header(response.headers(), "x-error-code")) {
            (_, Some("RevisionNotFound")) => {
                let message = format!("{name} has no revision `{revision}`");
                (Error::RevisionNotFound(message), Again::No)
            }
            (_, Some("GatedRepo")) => {
                let message = format!(
                    "{name} is gated, and {rejected}: accept its conditions at {endpoint}/{id}, and \
                     give a token of that account {TOKEN}"
                );
                (Error::Gated(message), Again::No)
            }
            (404, _) | (_, Some("RepoNotFound")) => (self.not_there(), Again::No),
            (401 | 403, _) => {
                let message = format!("{name} may not be read, {rejected}: give one {TOKEN}");
                (Error::Unauthorized(message), Again::No)
            }
            (429, _) => {
                let pause = wait.map_or(String::new(), |pause| {
                    format!(", and asks to wait for {} s", pause.as_secs())
                });
                let message = format!(
                    "{name}: too many requests: the Hub limits them (429){pause}; it allows more with a token"
                );
                (Error::RateLimited(message), wait.map_or(Again::Soon, Again::After))
            }
            (408 | 500..=599, _) => {
                let message = format!("{name}: the Hub answered {status}");
                (Error::Server(message), wait.map_or(Again::Soon, Again::After))
            }
            _ => (Error::Server(format!("{name}: the Hub answered {status}")), Again::No),
        };
        Trouble { error, again, progress: false }
    }
}

/// Whether a redirect to another host says all that was asked.
fn is_answered(response: &Response<Body>) -> bool {
    header(response.headers(), "x-linked-etag").is_some()
        || header(response.headers(), "x-repo-commit").is_some()
            && header(response.headers(), "etag").is_some()
}

/// One for all, which keeps connections.
fn agent() -> &'static Agent {
    static AGENT: OnceLock<Agent> = OnceLock::new();
    AGENT.get_or_init(|| {
        // Where the system has none, as in slim containers, those that ureq brings.
        let system = rustls_native_certs::load_native_certs().certs;
        let roots = match system.is_empty() {
            true => RootCerts::WebPki,
            false => {
                RootCerts::from(system.iter().map(|der| Certificate::from_der(der).to_owned()))
            }
        };
        Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .user_agent(concat!("bombus/", env!("CARGO_PKG_VERSION")))
            // The size of the file, and not of what a proxy makes of it.
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .build()
            .into()
    })
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// How long the Hub asks to wait: `Retry-After` in seconds or as a date (RFC 9110, 10.2.3), or
/// `RateLimit: "resolvers";r=0;t=55` (draft-ietf-httpapi-ratelimit-headers-09).
fn told_to_wait(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    if let Some(after) = header(headers, "retry-after").map(str::trim) {
        let until = |date: SystemTime| date.duration_since(now).unwrap_or(Duration::ZERO);
        let seconds = after.parse().map(Duration::from_secs).ok();
        return seconds.or_else(|| httpdate::parse_http_date(after).map(until).ok());
    }
    let limit = header(headers, "ratelimit")?;
    let value = |name: &str| {
        limit.split(';').find_map(|part| part.trim().strip_prefix(name)?.parse::<u64>().ok())
    };
    (value("r=")? == 0).then_some(Duration::from_secs(value("t=")?))
}

/// Without the quotes, and the mark of a weak one.
fn normalized(etag: &str) -> &str {
    etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"')
}

/// Whether what a server says can be the name of a file in the cache.
fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !name.is_empty() && name.len() <= 200 && !name.starts_with('.') && name.bytes().all(plain)
}

/// What may stand in a part of a path as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

fn encoded(part: &str) -> String {
    utf8_percent_encode(part, PLAIN).to_string()
}

fn uri(url: &str) -> Result<Uri> {
    let invalid = || Error::Server("the Hub's address is no valid URL: check HF_ENDPOINT".into());
    url.parse().ok().filter(|uri: &Uri| uri.authority().is_some()).ok_or_else(invalid)
}

/// The address that a `Location` means.
fn joined(base: &Uri, location: &str) -> Option<Uri> {
    let scheme = base.scheme_str()?;
    if location.starts_with("//") {
        return format!("{scheme}:{location}").parse().ok();
    }
    if location.contains("://") {
        return location.parse().ok();
    }
    let folder = base.path().rsplit_once('/').map_or("", |(folder, _file)| folder);
    let path = if location.starts_with('/') { "" } else { &format!("{folder}/") };
    format!("{scheme}://{}{path}{location}", base.authority()?).parse().ok()
}

fn is_same_origin(one: &Uri, other: &Uri) -> bool {
    let origin = |uri: &Uri| {
        let scheme = uri.scheme_str()?.to_owned();
        let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
        Some((scheme, uri.host()?.to_ascii_lowercase(), port))
    };
    origin(one).is_some() && origin(one) == origin(other)
}

/// For messages: no path (which may be signed), no password.
fn host(url: &Uri) -> &str {
    url.host().unwrap_or("the Hub")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        headers
    }

    #[test]
    fn it_waits_as_it_is_told() {
        let now = httpdate::parse_http_date("Wed, 21 Oct 2026 07:28:00 GMT").unwrap();
        let wait =
            |name, value: &str| told_to_wait(&headers(name, value), now).map(|d| d.as_secs());
        assert_eq!(wait("retry-after", "120"), Some(120));
        assert_eq!(wait("retry-after", "Wed, 21 Oct 2026 07:28:30 GMT"), Some(30));
        assert_eq!(wait("retry-after", "Wed, 21 Oct 2026 07:00:00 GMT"), Some(0));
        assert_eq!(wait("retry-after", "soon"), None);
        assert_eq!(wait("ratelimit", "\"resolvers\";r=0;t=55"), Some(55));
        assert_eq!(wait("ratelimit", "\"resolvers\";r=12;t=55"), None);
        assert_eq!(wait("etag", "x"), None);
    }

    #[test]
    fn a_server_names_no_file_outside_of_the_cache() {
        for name in ["", "..", "../x", "a/b", ".hidden", "a b", "a\0", &"x".repeat(201)] {
            assert!(!is_name(name), "{name:?}");
        }
        assert!(is_name("6d2c5a0f9b") && is_name("a-b_c.1"));
        assert_eq!(normalized("W/\"abc\""), "abc");
        assert_eq!(normalized("\"abc\""), "abc");
        assert_eq!(normalized("abc"), "abc");
    }

    #[test]
    fn a_location_is_followed_as_a_browser_does() {
        let base = uri("http://hub:1234/a/b?x=1").unwrap();
        let next = |location: &str| joined(&base, location).map(|uri| uri.to_string());
        assert_eq!(next("/c/d").as_deref(), Some("http://hub:1234/c/d"));
        assert_eq!(next("c?y=2").as_deref(), Some("http://hub:1234/a/c?y=2"));
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

    #[test]
    fn a_token_is_not_shown() {
        assert_eq!(format!("{:?}", Token("hf_secret".into())), "Token(..)");
    }
}
