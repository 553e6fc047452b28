//! Publishes to an MQTT broker: the state, what comes and goes, one answer a second; and how Home Assistant finds them.

mod packet;
#[cfg(feature = "tls")]
mod tls;

use super::{Answer, ResultSink, json, jsonl::event_lines};
use crate::error::{Error, Result};
use packet::{CONNECTED, Connect, DISCONNECT, PING, PUBLISHED, publish, refusal};
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long the broker may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Waits between attempts to connect: the first, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// Seconds within which this client says something, or the broker publishes its will.
const KEEP_ALIVE: u16 = 30;
/// Shortest time between two answers.
const ANSWER_EVERY: Duration = Duration::from_secs(1);

/// Where to publish: `mqtt://[USER@]HOST[:PORT]/TOPIC`, or `mqtts://` over TLS.
#[derive(Clone, Debug, PartialEq)]
pub struct Broker {
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Name to log in with.
    pub user: Option<String>,
    /// Password to log in with; not part of the address, which other users of the machine can see.
    pub password: Option<String>,
    /// What all topics begin with.
    pub topic: String,
    /// Whether the connection is encrypted, and the broker's certificate verified.
    pub tls: bool,
    /// File with the authorities that may have signed that certificate, PEM; `None` for the system's.
    pub authorities: Option<PathBuf>,
}

impl std::str::FromStr for Broker {
    type Err = Error;

    fn from_str(text: &str) -> Result<Broker> {
        let usage = |what: String, hint: &str| Error::Usage { what, hint: hint.into() };
        let form = "expected mqtt://[USER@]HOST[:PORT]/TOPIC, or mqtts:// for TLS";
        let tls = text.starts_with("mqtts://");
        if tls && !cfg!(feature = "tls") {
            // in one text: the command line shows no hint beside a value that it refuses
            let how = "vedge build --board NAME --tls, or cargo build --release --package vedge-runtime --features tls";
            return Err(usage(format!("`{text}`: this vedge-run was built without TLS; build it with: {how}"), ""));
        }
        let wrong = || usage(format!("`{text}` is no address of a broker"), form);
        let rest = text.strip_prefix(if tls { "mqtts://" } else { "mqtt://" });
        let (place, topic) = rest.and_then(|t| t.split_once('/')).ok_or_else(wrong)?;
        let (user, place) = place.rsplit_once('@').map_or((None, place), |(user, place)| (Some(user), place));
        if user.is_some_and(|u| u.contains(':')) {
            let what = "a password in a broker's address can be seen by every user of this machine".into();
            return Err(usage(what, "write it into a file: --mqtt-password FILE"));
        }
        let bracket = place.ends_with(']');
        let (host, port) = match place.rsplit_once(':') {
            Some((host, port)) if !bracket => (host, port.parse().map_err(|_| wrong())?),
            _ => (place, if tls { 8883 } else { 1883 }),
        };
        let topic = topic.trim_end_matches('/');
        if host.is_empty() || topic.is_empty() || topic.contains(['#', '+', '\0']) {
            return Err(wrong());
        }
        let host = host.trim_matches(['[', ']']).into();
        let (user, topic) = (user.map(Into::into), topic.into());
        Ok(Broker { host, port, user, password: None, topic, tls, authorities: None })
    }
}

/// A publisher. Where the broker is away it tries again, while its queue keeps the events.
pub struct Mqtt {
    broker: Broker,
    #[cfg(feature = "tls")]
    tls: Option<tls::Tls>,
    link: Option<Link>,
    model: String,
    state: Option<Option<String>>,
    answered: Option<Instant>,
    /// Says once that the broker is lost, and that it is back.
    tell: Box<dyn Fn(&str) + Send>,
    told: bool,
}

/// A connection's bytes, encrypted or not.
trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

/// A connection.
struct Link {
    stream: Box<dyn Stream>,
    said: Instant,
    next: u16,
}

impl Mqtt {
    /// A publisher; it connects with its first answer. `model` is a name for people.
    ///
    /// # Errors
    /// [`Error::Usage`] when the authorities for TLS cannot be read.
    pub fn new(broker: Broker, model: &str, tell: Box<dyn Fn(&str) + Send>) -> Result<Mqtt> {
        Ok(Mqtt {
            #[cfg(feature = "tls")]
            tls: broker.tls.then(|| tls::Tls::new(&broker.host, broker.authorities.as_deref())).transpose()?,
            broker,
            link: None,
            model: model.into(),
            state: None,
            answered: None,
            tell,
            told: false,
        })
    }

    /// Publishes, acknowledged where it must not be lost; tries as often as it takes.
    fn send(&mut self, topic: &str, payload: &str, retain: bool, acknowledged: bool) {
        let mut wait = RETRY.0;
        while let Err(e) = self.attempt(topic, payload, retain, acknowledged) {
            self.link = None;
            if !std::mem::replace(&mut self.told, true) {
                (self.tell)(&format!("broker {}:{}: {e}; trying again", self.broker.host, self.broker.port));
            }
            std::thread::sleep(wait);
            wait = (wait * 2).min(RETRY.1);
        }
        if std::mem::take(&mut self.told) {
            (self.tell)(&format!("broker {}:{}: connected again", self.broker.host, self.broker.port));
        }
    }

    fn attempt(&mut self, topic: &str, payload: &str, retain: bool, acknowledged: bool) -> io::Result<()> {
        if self.link.is_none() {
            self.link = Some(self.connect()?);
        }
        match &mut self.link {
            Some(link) => link.publish(topic, payload, retain, acknowledged),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn connect(&self) -> io::Result<Link> {
        let b = &self.broker;
        let topic = |name: &str| format!("{}/{name}", b.topic);
        let client = format!("vedge-{}", b.topic.replace('/', "-"));
        let password = b.password.as_deref().unwrap_or_default();
        let login = b.user.as_deref().map(|user| (user, password));
        let availability = topic("availability");
        let connect = Connect { client: &client, will: (&availability, "offline"), login, keep_alive: KEEP_ALIVE };
        let mut link = Link::open(&b.host, b.port, &connect, |stream| self.encrypted(stream))?;
        link.publish(&availability, "online", true, true)?;
        let discovery = format!("homeassistant/sensor/{client}/config");
        link.publish(&discovery, &self.discovery(&client), true, true)?;
        Ok(link)
    }

    #[cfg(feature = "tls")]
    fn encrypted(&self, stream: TcpStream) -> io::Result<Box<dyn Stream>> {
        match &self.tls {
            Some(tls) => Ok(Box::new(tls.over(stream)?)),
            None => Ok(Box::new(stream)),
        }
    }

    #[cfg(not(feature = "tls"))]
    fn encrypted(&self, stream: TcpStream) -> io::Result<Box<dyn Stream>> {
        match self.broker.tls {
            true => Err(io::ErrorKind::Unsupported.into()),
            false => Ok(Box::new(stream)),
        }
    }

    /// Home Assistant's MQTT discovery: a sensor whose value is the state.
    fn discovery(&self, client: &str) -> String {
        let topic = &self.broker.topic;
        let device =
            serde_json::json!({ "identifiers": [client], "name": topic, "manufacturer": "vedge", "model": self.model });
        serde_json::json!({
            "name": "Seen",
            "unique_id": client,
            "state_topic": format!("{topic}/state"),
            "availability_topic": format!("{topic}/availability"),
            "json_attributes_topic": format!("{topic}/answer"),
            "icon": "mdi:cctv",
            "device": device,
        })
        .to_string()
    }
}

impl ResultSink for Mqtt {
    fn put(&mut self, answer: &Answer) -> io::Result<()> {
        let topic = |name: &str| format!("{}/{name}", self.broker.topic);
        let (event, state, frame) = (topic("event"), topic("state"), topic("answer"));
        for line in event_lines(answer) {
            self.send(&event, &line, false, true);
        }
        if self.state.as_ref() != Some(&answer.state) {
            self.send(&state, answer.state.as_deref().unwrap_or("none"), true, true);
            self.state = Some(answer.state.clone());
        }
        if self.answered.is_none_or(|at| at.elapsed() >= ANSWER_EVERY) {
            self.send(&frame, &json(answer), false, false);
            self.answered = Some(Instant::now());
        }
        Ok(())
    }

    fn idle(&mut self) {
        if let Some(link) = &mut self.link
            && link.said.elapsed() >= Duration::from_secs(u64::from(KEEP_ALIVE) / 2)
            && link.ping().is_err()
        {
            self.link = None;
        }
    }

    fn capacity(&self) -> usize {
        16
    }
}

impl Drop for Mqtt {
    fn drop(&mut self) {
        if let Some(link) = &mut self.link {
            let availability = format!("{}/availability", self.broker.topic);
            // the will is for those who cannot say good-bye
            let _ = link.publish(&availability, "offline", true, true);
            let _ = link.stream.write_all(&DISCONNECT);
        }
    }
}

impl Link {
    fn open(
        host: &str,
        port: u16,
        connect: &Connect,
        encrypted: impl Fn(TcpStream) -> io::Result<Box<dyn Stream>>,
    ) -> io::Result<Link> {
        let mut last = io::Error::other("its name has no address");
        for address in (host, port).to_socket_addrs()? {
            let stream = match TcpStream::connect_timeout(&address, PATIENCE) {
                Ok(stream) => stream,
                Err(e) => {
                    last = e;
                    continue;
                }
            };
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            let mut link = Link { stream: encrypted(stream)?, said: Instant::now(), next: 1 };
            link.stream.write_all(&connect.packet())?;
            let answer = link.expect(CONNECTED)?;
            return match refusal(answer[1]) {
                None => Ok(link),
                Some(why) => Err(io::Error::other(format!("refuses the connection: {why}"))),
            };
        }
        Err(last)
    }

    fn publish(&mut self, topic: &str, payload: &str, retain: bool, acknowledged: bool) -> io::Result<()> {
        let id = acknowledged.then_some(self.next);
        self.stream.write_all(&publish(topic, payload, retain, id))?;
        self.said = Instant::now();
        if let Some(id) = id {
            self.next = id.checked_add(1).unwrap_or(1);
            while self.expect(PUBLISHED)? != id.to_be_bytes() {}
        }
        Ok(())
    }

    fn ping(&mut self) -> io::Result<()> {
        self.stream.write_all(&PING)?;
        self.said = Instant::now();
        Ok(())
    }

    /// Reads packets until one of that kind comes; its two bytes. Answers to pings are passed over.
    fn expect(&mut self, kind: u8) -> io::Result<[u8; 2]> {
        loop {
            let mut head = [0; 2];
            self.stream.read_exact(&mut head)?;
            let mut body = vec![0; usize::from(head[1])];
            if head[1] >= 0x80 {
                return Err(io::Error::other("sends what a publisher is not sent"));
            }
            self.stream.read_exact(&mut body)?;
            if head[0] == kind {
                return body.try_into().map_err(|_| io::Error::other("sends a packet of a wrong length"));
            }
        }
    }
}

#[cfg(test)]
mod tests;
