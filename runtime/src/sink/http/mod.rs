//! A page to look at, and what other programs read, over HTTP: a thread a client, few clients.

mod board;
mod request;

use super::{Answer, ResultSink};
use crate::error::{Error, Result};
use crate::pipeline::Totals;
use board::Board;
use request::{Request, begin, read, respond};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Clients at a time.
const CLIENTS: usize = 16;
/// How long a client may take to ask, and to take what it is sent.
const PATIENCE: Duration = Duration::from_secs(5);
/// Shortest time between two pictures of the live view.
const PICTURE_EVERY: Duration = Duration::from_millis(66);

const PAGE: &str = include_str!("page.html");

/// Shows answers.
pub struct Http {
    board: Arc<Board>,
}

/// Who may look.
struct Server {
    board: Arc<Board>,
    token: Option<String>,
    /// Bound to this machine alone: then other names for it are refused, which a web page elsewhere could make up.
    local: bool,
    clients: AtomicUsize,
}

impl Http {
    /// Listens; also says where. Other machines are let in with a token only.
    ///
    /// # Errors
    /// [`Error::Usage`] for an address of other machines without a token, [`Error::Source`] when the address is taken.
    pub fn listen(address: SocketAddr, token: Option<String>, totals: Arc<Totals>) -> Result<(Http, SocketAddr)> {
        let local = address.ip().is_loopback();
        if !local && token.is_none() {
            let what = format!("{address} can be reached from other machines, and there is no token");
            return Err(Error::Usage { what, hint: "give --http-token FILE, or use 127.0.0.1".into() });
        }
        let failed =
            |e: io::Error| Error::Source { what: format!("cannot listen at {address}: {e}"), hint: String::new() };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let board = Arc::new(Board::new(totals));
        let server = Arc::new(Server { board: Arc::clone(&board), token, local, clients: AtomicUsize::new(0) });
        let work = move || listener.incoming().flatten().for_each(|stream| server.welcome(stream));
        std::thread::Builder::new().name("http".into()).spawn(work).map_err(failed)?;
        Ok((Http { board }, bound))
    }
}

impl ResultSink for Http {
    fn put(&mut self, answer: &Answer) -> io::Result<()> {
        self.board.show(answer);
        Ok(())
    }

    fn capacity(&self) -> usize {
        2
    }

    fn wants_frames(&self) -> bool {
        true
    }
}

impl Server {
    fn welcome(self: &Arc<Server>, mut stream: TcpStream) {
        let limits = stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
        if limits.is_err() {
            return;
        }
        if self.clients.fetch_add(1, Relaxed) >= CLIENTS {
            self.clients.fetch_sub(1, Relaxed);
            // closing on an unread request would take the answer back
            let _ = stream.set_read_timeout(Some(Duration::from_millis(100)));
            let _ = stream.read(&mut [0; 2048]);
            let _ = respond(&mut stream, "503 Service Unavailable", "text/plain", b"too many clients\n", false);
            return;
        }
        let server = Arc::clone(self);
        let serve = move || {
            // a client that goes away is none of our business
            let _ = server.serve(&mut stream);
            server.clients.fetch_sub(1, Relaxed);
        };
        if std::thread::Builder::new().name("client".into()).spawn(serve).is_err() {
            self.clients.fetch_sub(1, Relaxed);
        }
    }

    fn serve(&self, stream: &mut TcpStream) -> io::Result<()> {
        let _ = stream.set_nodelay(true);
        let Some(request) = read(stream)? else {
            return respond(stream, "400 Bad Request", "text/plain", b"not understood\n", false);
        };
        let head_only = request.method == "HEAD";
        if request.method != "GET" && !head_only {
            return respond(stream, "405 Method Not Allowed", "text/plain", b"GET only\n", head_only);
        }
        if let Some((status, why)) = self.refuse(&request) {
            return respond(stream, status, "text/plain", why, head_only);
        }
        match request.path.as_str() {
            "/" => respond(stream, "200 OK", "text/html; charset=utf-8", PAGE.as_bytes(), head_only),
            "/stream.mjpg" if !head_only => self.pictures(stream),
            "/events" if !head_only => self.events(stream),
            "/snapshot.jpg" => match self.board.jpeg(&mut 0) {
                Some(jpeg) => respond(stream, "200 OK", "image/jpeg", &jpeg, head_only),
                None => respond(stream, "503 Service Unavailable", "text/plain", b"no picture yet\n", head_only),
            },
            "/healthz" => {
                let (healthy, text) = self.board.health();
                let status = if healthy { "200 OK" } else { "503 Service Unavailable" };
                respond(stream, status, "text/plain; charset=utf-8", text.as_bytes(), head_only)
            }
            "/metrics" => {
                let text = self.board.metrics();
                respond(stream, "200 OK", "text/plain; version=0.0.4; charset=utf-8", text.as_bytes(), head_only)
            }
            _ => respond(stream, "404 Not Found", "text/plain", b"nothing here\n", head_only),
        }
    }

    /// Why a request is not answered.
    fn refuse(&self, request: &Request) -> Option<(&'static str, &'static [u8])> {
        match &self.token {
            Some(token) if !request.token.as_deref().is_some_and(|given| same(given, token)) => {
                Some(("401 Unauthorized", b"the token is missing or wrong: /?token=TOKEN\n"))
            }
            None if self.local && !is_local(&request.host) => Some(("403 Forbidden", b"this address is local\n")),
            _ => None,
        }
    }

    /// JPEG pictures until the client goes away.
    fn pictures(&self, stream: &mut TcpStream) -> io::Result<()> {
        begin(stream, "200 OK", "multipart/x-mixed-replace; boundary=frame", None)?;
        let mut seen = 0;
        loop {
            let start = Instant::now();
            if let Some(jpeg) = self.board.jpeg(&mut seen) {
                let head = format!("--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\n\r\n", jpeg.len());
                stream.write_all(&[head.as_bytes(), jpeg.as_slice(), b"\r\n"].concat())?;
            } else {
                // shows a client that has gone; between parts any text may stand
                stream.write_all(b"\r\n")?;
            }
            std::thread::sleep(PICTURE_EVERY.saturating_sub(start.elapsed()));
        }
    }

    /// Server-sent events: each answer that the client keeps up with, and every change, or how many it has `missed`.
    fn events(&self, stream: &mut TcpStream) -> io::Result<()> {
        begin(stream, "200 OK", "text/event-stream", None)?;
        let (mut seen, mut changes) = (0, 0);
        loop {
            let text = match self.board.news(&mut seen, &mut changes) {
                Some(news) => {
                    let changes = news.events.iter().map(|line| format!("event: change\ndata: {line}\n\n"));
                    let missed = match news.missed {
                        0 => String::new(),
                        n => format!("event: missed\ndata: {n}\n\n"),
                    };
                    missed + &changes.collect::<String>() + &format!("data: {}\n\n", news.line)
                }
                None => ": waiting\n\n".into(),
            };
            stream.write_all(text.as_bytes())?;
        }
    }
}

fn is_local(host: &str) -> bool {
    let ip = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback())
}

/// Compares in a time that does not depend on where the difference is.
fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |acc, (a, b)| acc | (a ^ b)) == 0
}

#[cfg(test)]
mod tests;
