//! The packets of MQTT 3.1.1 (OASIS standard, 2014) that a publisher sends and reads.

/// What the broker is told about this client.
pub struct Connect<'a> {
    /// Names the client; must be unique at the broker.
    pub client: &'a str,
    /// Where and what the broker publishes when the client is lost; retained.
    pub will: (&'a str, &'a str),
    /// Name and password.
    pub login: Option<(&'a str, &'a str)>,
    /// Seconds within which the client says something.
    pub keep_alive: u16,
}

impl Connect<'_> {
    /// CONNECT, with a clean session.
    pub fn packet(&self) -> Vec<u8> {
        // will, of quality 1 and retained, clean session; name and password
        let flags = 0b0010_1110 | if self.login.is_some() { 0b1100_0000 } else { 0 };
        let mut body = string("MQTT");
        body.extend([4, flags]);
        body.extend(self.keep_alive.to_be_bytes());
        for text in [self.client, self.will.0, self.will.1] {
            body.extend(string(text));
        }
        if let Some((name, password)) = self.login {
            body.extend(string(name));
            body.extend(string(password));
        }
        packet(0x10, &body)
    }
}

/// PUBLISH; with an identifier of quality 1 (acknowledged), else 0.
pub fn publish(topic: &str, payload: &str, retain: bool, id: Option<u16>) -> Vec<u8> {
    let mut body = string(topic);
    body.extend(id.iter().flat_map(|id| id.to_be_bytes()));
    body.extend(payload.as_bytes());
    packet(0x30 | u8::from(id.is_some()) << 1 | u8::from(retain), &body)
}

/// PINGREQ.
pub const PING: [u8; 2] = [0xC0, 0];
/// DISCONNECT: the will is not published.
pub const DISCONNECT: [u8; 2] = [0xE0, 0];
/// First byte of CONNACK, PUBACK and PINGRESP.
pub const CONNECTED: u8 = 0x20;
/// See [`CONNECTED`].
pub const PUBLISHED: u8 = 0x40;

/// What a broker says to CONNECT, in words; `None` is yes.
pub fn refusal(code: u8) -> Option<&'static str> {
    match code {
        0 => None,
        1 => Some("it does not speak MQTT 3.1.1"),
        2 => Some("it does not take this client's name"),
        3 => Some("it is not available"),
        4 => Some("name or password is wrong"),
        5 => Some("this client may not connect"),
        _ => Some("it gives no reason that is known"),
    }
}

fn packet(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    let mut rest = body.len();
    loop {
        let digit = (rest % 128) as u8;
        rest /= 128;
        out.push(if rest > 0 { digit | 0x80 } else { digit });
        if rest == 0 {
            break;
        }
    }
    out.extend(body);
    out
}

fn string(text: &str) -> Vec<u8> {
    // longer ones do not exist in this protocol; a label or path is cut at a whole character
    let mut end = text.len().min(65_535);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut out = (end as u16).to_be_bytes().to_vec();
    out.extend(&text.as_bytes()[..end]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets() {
        assert_eq!(publish("a", "b", true, None), [0x31, 4, 0, 1, b'a', b'b']);
        assert_eq!(publish("a", "b", false, Some(258)), [0x32, 6, 0, 1, b'a', 1, 2, b'b']);
        let long = publish("a", &"x".repeat(200), false, None);
        assert_eq!(long[..3], [0x30, 203 - 128 + 128, 1]);
        let connect = Connect { client: "c", will: ("t", "off"), login: Some(("u", "p")), keep_alive: 60 };
        let mut want = vec![0x10, 27, 0, 4, b'M', b'Q', b'T', b'T', 4, 0xEE, 0, 60, 0, 1, b'c', 0, 1, b't', 0, 3];
        want.extend([b'o', b'f', b'f', 0, 1, b'u', 0, 1, b'p']);
        assert_eq!(connect.packet(), want);
    }
}
