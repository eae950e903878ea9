//! Questions to the Hub, and what its answers mean.
//!
//! Files are at `<endpoint>/<id>/resolve/<revision>/<path>`. The answer names the commit
//! (`X-Repo-Commit`), the hash (`X-Linked-Etag` or `ETag`: SHA-256 of large files, git's name of small
//! ones) and the size (`X-Linked-Size` or `Content-Length`), and mostly redirects to another host.
//! Errors are told apart by `X-Error-Code`. As in huggingface_hub's `file_download.py` and
//! `utils/_http.py`.

use super::address::{encoded, host, is_same_origin, joined, page, uri};
use super::pace::{self, Paced};
use super::watch::Watch;
use super::{Settings, Source};
use crate::error::{Error, Result};
use crate::files;
use std::collections::HashMap;
use std::fmt;
use std::io::{ErrorKind, Read};
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
    /// The commit has no such file; `for_good` where that can be remembered.
    Absent {
        for_good: bool,
    },
    /// It was not asked: the file is in the cache.
    Here,
}

/// `/api/models/<id>/revision/<revision>`
#[derive(serde::Deserialize)]
struct Listing {
    sha: Option<String>,
    siblings: Vec<Sibling>,
}

#[derive(serde::Deserialize)]
struct Sibling {
    rfilename: String,
    /// Where the question has `blobs=true`.
    size: Option<u64>,
}

/// Why an attempt failed, and whether there may be another.
pub struct Trouble {
    pub error: Error,
    pub again: Again,
    /// Many bytes came: it was not in vain.
    pub progress: bool,
}

pub enum Again {
    No,
    Soon,
    /// After so little that there are fewer attempts.
    Slow,
    /// As the Hub says.
    After(Duration),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self { error, again: Again::No, progress: false }
    }
}

pub struct Client<'a> {
    pub settings: &'a Settings,
    source: &'a Source,
    pub watch: &'a Watch,
    endpoint: Uri,
}

/// How much trouble is worth: there may be something in the cache to fall back on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Patience {
    /// A second attempt, since a connection that was kept may have ended; no long waits.
    Short,
    Long,
}

const ATTEMPTS: u32 = 5;
/// So many of them count for one that was slow, which takes long.
const SLOW: u32 = 3;
/// What the Hub may make us wait, all together: twice its window for counting requests.
const LONGEST_WAIT: Duration = Duration::from_secs(600);
/// Whatever is longer is as good as this.
const A_DAY: Duration = Duration::from_secs(24 * 3600);
const REDIRECTS: usize = 10;
/// After so long without a byte a connection counts as lost, as in huggingface_hub.
const SILENCE: Duration = Duration::from_secs(10);
/// What only the Hub says, and not where it redirects to.
const OF_THE_HUB: [&str; 3] = ["x-repo-commit", "x-linked-etag", "x-linked-size"];
/// A listing of more bytes is none.
const LISTING: u64 = 64 << 20;
/// How to give one, in messages.
const TOKEN: &str = "as auth_token: or HF_TOKEN (https://huggingface.co/settings/tokens)";

impl<'a> Client<'a> {
    pub fn new(settings: &'a Settings, source: &'a Source, watch: &'a Watch) -> Result<Self> {
        let endpoint = uri(&settings.endpoint)?;
        Ok(Self { settings, source, watch, endpoint })
    }

    /// Where a file is.
    pub fn url(&self, revision: &str, path: &str) -> Result<Uri> {
        let path: Vec<_> = path.split('/').map(encoded).collect();
        let (id, revision) = (&self.source.id, encoded(revision));
        uri(&format!("{}/{id}/resolve/{revision}/{}", self.settings.endpoint, path.join("/")))
    }

    /// The commit that the revision is, with what it says of this file.
    pub fn head_of_revision(&self, path: &str, patience: Patience) -> Result<(String, Reply)> {
        let (commit, reply) = self.ask(&self.source.revision, path, patience)?;
        let commit = match (commit, &reply) {
            // What has no such file does not always say what it is.
            (None, Reply::Absent { .. }) => self.listing(&self.source.revision)?.sha,
            (commit, _) => commit,
        };
        let commit = commit.filter(|commit| is_name(commit));
        Ok((commit.ok_or_else(|| self.no_hub("X-Repo-Commit"))?, reply))
    }

    pub fn head(&self, commit: &str, path: &str) -> Result<Reply> {
        Ok(self.ask(commit, path, Patience::Long)?.1)
    }

    fn ask(
        &self,
        revision: &str,
        path: &str,
        patience: Patience,
    ) -> Result<(Option<String>, Reply)> {
        let url = self.url(revision, path)?;
        self.patiently(patience, || {
            let response = self.request(Method::HEAD, url.clone(), None)?;
            let commit = header(response.headers(), "x-repo-commit").map(str::to_owned);
            if response.status().is_success() || response.status().is_redirection() {
                return Ok((commit, Reply::Found(self.found(&response)?)));
            }
            let code = header(response.headers(), "x-error-code");
            match response.status() == 404 && matches!(code, None | Some("EntryNotFound")) {
                // Without the Hub's own word it may be anybody's answer.
                true => {
                    let for_good = code.is_some() && commit.is_some();
                    Ok((commit, Reply::Absent { for_good }))
                }
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
        let siblings = self.listing(commit)?.siblings;
        Ok(siblings.into_iter().map(|sibling| sibling.rfilename).collect())
    }

    /// The sizes of all files of a commit.
    pub fn sizes(&self, commit: &str) -> Result<HashMap<String, u64>> {
        let siblings = self.listing(commit)?.siblings;
        let sized = |sibling: Sibling| Some((sibling.rfilename, sibling.size?));
        Ok(siblings.into_iter().filter_map(sized).collect())
    }

    fn listing(&self, revision: &str) -> Result<Listing> {
        let (endpoint, id) = (&self.settings.endpoint, &self.source.id);
        let url =
            uri(&format!("{endpoint}/api/models/{id}/revision/{}?blobs=true", encoded(revision)))?;
        self.patiently(Patience::Long, || {
            let response = self.get(url.clone(), 0)?;
            let mut text = vec![];
            let read = self.body(response).take(LISTING).read_to_end(&mut text);
            read.map_err(|error| self.unreachable(&url, error.into()))?;
            let name = self.name();
            files::parse::<Listing>(&text)
                .map_err(|error| Error::Server(format!("{name}: no valid listing: {error}")).into())
        })
    }

    /// The bytes of a file, after the first `from`.
    pub fn get(&self, url: Uri, from: u64) -> Result<Response<Body>, Trouble> {
        self.get_range(url, (from > 0).then(|| format!("{from}-")))
    }

    /// The first `count` bytes of a file, or all of it.
    pub fn get_first(&self, url: Uri, count: u64) -> Result<Response<Body>, Trouble> {
        self.get_range(url, Some(format!("0-{}", count.saturating_sub(1))))
    }

    fn get_range(&self, url: Uri, range: Option<String>) -> Result<Response<Body>, Trouble> {
        let response = self.request(Method::GET, url, range.as_deref())?;
        match response.status() {
            status if status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE => {
                Ok(response)
            }
            _ => Err(self.refused(&response)),
        }
    }

    /// The bytes of an answer; an error where they come too slowly.
    pub fn body(&self, response: Response<Body>) -> impl Read + use<> {
        Paced::new(response.into_body().into_reader(), self.settings.pace)
    }

    /// Tries until it works, or will not.
    pub fn patiently<T>(
        &self,
        patience: Patience,
        mut attempt: impl FnMut() -> Result<T, Trouble>,
    ) -> Result<T> {
        let (most, longest) = match patience {
            Patience::Short => (2, Duration::ZERO),
            Patience::Long => (ATTEMPTS, LONGEST_WAIT),
        };
        let (mut attempts, mut waited) = (0, Duration::ZERO);
        loop {
            self.watch.check()?;
            let trouble = match attempt() {
                Ok(value) => return Ok(value),
                Err(trouble) => trouble,
            };
            attempts = match trouble.again {
                _ if trouble.progress => 1,
                Again::Slow => attempts + SLOW,
                _ => attempts + 1,
            };
            let pause = match trouble.again {
                Again::Soon | Again::Slow => self.settings.pause * 2u32.pow(attempts - 1),
                Again::After(pause) => {
                    waited += pause;
                    pause
                }
                Again::No => return Err(trouble.error),
            };
            if attempts >= most || waited > longest {
                return Err(trouble.error);
            }
            self.watch.waiting(trouble.error.to_string(), pause);
            self.watch.sleep(pause)?;
        }
    }

    /// One request, with its redirects. The token goes to the endpoint alone. Of a file on another
    /// host the head is not asked for, where the redirect says all of it: a signed address is for GET.
    fn request(
        &self,
        method: Method,
        mut url: Uri,
        range: Option<&str>,
    ) -> Result<Response<Body>, Trouble> {
        let mut said = HeaderMap::new();
        for _redirect in 0..=REDIRECTS {
            let mut response = self.send(&method, &url, range)?;
            let headers = response.headers_mut();
            for name in OF_THE_HUB {
                // What a redirect says of a file counts for where it leads to.
                if let Some(value) = headers.get(name).or(said.get(name)).cloned() {
                    said.insert(name, value.clone());
                    headers.insert(name, value);
                }
            }
            let status = response.status();
            if let Some(location) = header(response.headers(), "location")
                && status.is_redirection()
            {
                let next = joined(&url, location)
                    .ok_or_else(|| self.no_hub("Location that can be followed"))?;
                let elsewhere = !is_same_origin(&next, &url);
                if method == Method::HEAD && elsewhere && is_answered(response.headers()) {
                    return Ok(response);
                }
                url = next;
            } else if matches!(status.as_u16(), 400..=407 | 410)
                && !is_same_origin(&url, &self.endpoint)
            {
                // A signed address that is too old: another one comes from the endpoint.
                let (name, host) = (self.name(), host(&url));
                let error = Error::Server(format!("{name}: {host} answered {}", status.as_u16()));
                return Err(Trouble { error, again: Again::Soon, progress: false });
            } else {
                return Ok(response);
            }
        }
        Err(Error::Server(format!("{}: more than {REDIRECTS} redirects", self.name())).into())
    }

    fn send(
        &self,
        method: &Method,
        url: &Uri,
        range: Option<&str>,
    ) -> Result<Response<Body>, Trouble> {
        let mut request = Request::builder().method(method).uri(url);
        if let Some(Token(token)) = &self.settings.token
            && is_same_origin(url, &self.endpoint)
        {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if let Some(range) = range {
            request = request.header("range", format!("bytes={range}"));
        }
        let sent = request.body(()).map_err(ureq::Error::from).and_then(|r| agent().run(r));
        sent.map_err(|error| self.unreachable(url, error))
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
        let (name, host) = (self.name(), host(url));
        let again = match error {
            // A certificate does not get better.
            ureq::Error::Tls(_) | ureq::Error::Rustls(_) => Again::No,
            ureq::Error::Io(ref error) if error.kind() == ErrorKind::InvalidData => Again::No,
            ureq::Error::Io(ref error) if pace::is_slow(error) => Again::Slow,
            // They would show the address, which may be signed.
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
                return Error::Server(format!("{name}: {host} has no address that works")).into();
            }
            _ => Again::Soon,
        };
        let message = format!("{name}: the connection with {host} failed: {error}");
        Trouble { error: Error::NoNetwork(message), again, progress: false }
    }

    /// What an answer means that is none of those that were hoped for.
    fn refused(&self, response: &Response<Body>) -> Trouble {
        let Source { id, revision, .. } = self.source;
        let (name, page) = (self.name(), page(&self.endpoint, id));
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
                    "{name} is gated, and {rejected}: accept its conditions at {page}, and \
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
fn is_answered(headers: &HeaderMap) -> bool {
    headers.contains_key("x-linked-etag")
        || headers.contains_key("x-repo-commit") && headers.contains_key("etag")
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
        let wait = after.parse().map(Duration::from_secs).ok();
        let wait = wait.or_else(|| httpdate::parse_http_date(after).map(until).ok());
        return wait.map(|wait| wait.min(A_DAY));
    }
    let limit = header(headers, "ratelimit")?;
    let value = |name: &str| {
        limit.split(';').find_map(|part| part.trim().strip_prefix(name)?.parse::<u64>().ok())
    };
    (value("r=")? == 0).then_some(Duration::from_secs(value("t=")?).min(A_DAY))
}

/// Without the quotes, and the mark of a weak one.
fn normalized(etag: &str) -> &str {
    etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"')
}

/// Whether what a server says can be the name of a file in the cache.
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    // What is not whole yet, and the locks.
    let ours = [".incomplete", ".lock"].iter().any(|end| name.ends_with(end));
    let begins = !name.starts_with('.');
    !name.is_empty() && name.len() <= 200 && begins && !ours && name.bytes().all(plain)
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
        assert_eq!(wait("retry-after", "18446744073709551615"), Some(86400));
        assert_eq!(wait("ratelimit", "\"resolvers\";r=0;t=55"), Some(55));
        assert_eq!(wait("ratelimit", "\"resolvers\";r=12;t=55"), None);
        assert_eq!(wait("etag", "x"), None);
    }

    #[test]
    fn a_server_names_no_file_outside_of_the_cache() {
        for name in
            ["", "..", "../x", "a/b", ".hidden", "a b", "a\0", "a.incomplete", &"x".repeat(201)]
        {
            assert!(!is_name(name), "{name:?}");
        }
        assert!(is_name("6d2c5a0f9b") && is_name("a-b_c.1"));
        assert_eq!(normalized("W/\"abc\""), "abc");
        assert_eq!(normalized("\"abc\""), "abc");
        assert_eq!(normalized("abc"), "abc");
    }

    #[test]
    fn a_token_is_not_shown() {
        assert_eq!(format!("{:?}", Token("hf_secret".into())), "Token(..)");
    }
}
