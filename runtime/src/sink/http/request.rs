//! As much of HTTP/1.1 (RFC 9112) as a page for looking needs: one GET a connection.

use std::io::{self, Read, Write};
use std::net::TcpStream;

/// Longest request head that is read.
const LONGEST: usize = 8192;

/// What a client asks for.
#[derive(Debug, PartialEq)]
pub struct Request {
    /// `GET` or `HEAD`, the only ones answered.
    pub method: String,
    /// Path without the query.
    pub path: String,
    /// The token, of the query or of the header Authorization.
    pub token: Option<String>,
    /// The header Host, without the port.
    pub host: String,
}

/// Reads the head of a request; `None` when it is none.
pub fn read(stream: &mut TcpStream) -> io::Result<Option<Request>> {
    let mut head = vec![];
    let mut byte = [0; 512];
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        match stream.read(&mut byte)? {
            0 => return Ok(None),
            n => head.extend_from_slice(&byte[..n]),
        }
        if head.len() > LONGEST {
            return Ok(None);
        }
    }
    Ok(parse(&String::from_utf8_lossy(&head)))
}

fn parse(head: &str) -> Option<Request> {
    let mut lines = head.split("\r\n");
    let mut words = lines.next()?.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    if !version.starts_with("HTTP/1.") || !target.starts_with('/') {
        return None;
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let header = |name: &str| {
        let headers = lines.clone().filter_map(|line| line.split_once(':'));
        headers.into_iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    };
    let bearer = header("authorization").and_then(|v| v.strip_prefix("Bearer "));
    let token = query.split('&').find_map(|pair| pair.strip_prefix("token=")).or(bearer).map(Into::into);
    let host = header("host").unwrap_or_default();
    // the port comes after the last colon, but [::1] has colons of its own
    let host = if host.ends_with(']') { host } else { host.rsplit_once(':').map_or(host, |(host, _)| host) };
    Some(Request { method: method.into(), path: path.into(), token, host: host.to_ascii_lowercase() })
}

/// Writes a whole answer.
pub fn respond(stream: &mut TcpStream, status: &str, kind: &str, body: &[u8], head_only: bool) -> io::Result<()> {
    begin(stream, status, kind, Some(body.len()))?;
    if !head_only {
        stream.write_all(body)?;
    }
    stream.flush()
}

/// Writes the head of an answer; without a length the body ends with the connection.
pub fn begin(stream: &mut TcpStream, status: &str, kind: &str, length: Option<usize>) -> io::Result<()> {
    let length = length.map(|n| format!("Content-Length: {n}\r\n")).unwrap_or_default();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{length}Cache-Control: no-store\r\nConnection: close\r\n\
         X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\nX-Frame-Options: DENY\r\n\
         Content-Security-Policy: default-src 'none'; img-src 'self'; connect-src 'self'; script-src 'unsafe-inline'; \
         style-src 'unsafe-inline'\r\n\r\n"
    );
    stream.write_all(head.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests() {
        let r = parse("GET /events?x=1&token=abc HTTP/1.1\r\nHost: LocalHost:8080\r\n\r\n").unwrap();
        assert_eq!((r.path.as_str(), r.token.as_deref(), r.host.as_str()), ("/events", Some("abc"), "localhost"));
        let r = parse("GET / HTTP/1.1\r\nhost: [::1]:80\r\nauthorization: Bearer t\r\n\r\n").unwrap();
        assert_eq!((r.token.as_deref(), r.host.as_str()), (Some("t"), "[::1]"));
        assert_eq!(parse("GET / HTTP/1.0\r\nHost: [::1]\r\n\r\n").unwrap().host, "[::1]");
        for bad in ["", "GET\r\n\r\n", "GET / FTP/1\r\n\r\n", "GET http://x/ HTTP/1.1\r\n\r\n"] {
            assert!(parse(bad).is_none(), "{bad}");
        }
    }
}
