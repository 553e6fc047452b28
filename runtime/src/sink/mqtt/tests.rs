use super::*;
use crate::decide::{Change, Event};
use crate::sink::tests::answer;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

fn broker(text: &str) -> Result<Broker> {
    text.parse()
}

#[test]
fn addresses() {
    let b = broker("mqtt://cam@broker.lan:1884/yard/door/").unwrap();
    assert_eq!(
        (b.host.as_str(), b.port, b.user.as_deref(), b.topic.as_str()),
        ("broker.lan", 1884, Some("cam"), "yard/door")
    );
    assert_eq!(broker("mqtt://[::1]/x").unwrap().host, "::1");
    for (bad, word) in [
        ("http://x/y", "address"),
        ("mqtt://x", "address"),
        ("mqtt:///y", "address"),
        ("mqtt://x:0x1/y", "address"),
        ("mqtt://x/a/#", "address"),
        ("mqtt://u:p@x/y", "password"),
    ] {
        let e = broker(bad).unwrap_err();
        assert!(e.to_string().contains(word) && e.hint().is_some(), "{bad}: {e}");
    }
}

#[cfg(not(feature = "tls"))]
#[test]
fn without_tls_it_says_how_to_build_it() {
    let e = broker("mqtts://x/y").unwrap_err();
    assert!(e.to_string().contains("without TLS") && e.to_string().contains("--features tls"), "{e}");
}

#[cfg(feature = "tls")]
#[test]
fn addresses_and_authorities_of_tls() {
    let b = broker("mqtts://cam@broker.lan/yard").unwrap();
    assert_eq!((b.tls, b.port, b.host.as_str()), (true, 8883, "broker.lan"));
    assert_eq!(broker("mqtts://[::1]:99/x").unwrap().port, 99);
    let dir = tempfile::tempdir().unwrap();
    let with = |text: &str| {
        let file = dir.path().join("ca.pem");
        std::fs::write(&file, text).unwrap();
        let b = Broker { authorities: Some(file), ..broker("mqtts://broker.lan/yard").unwrap() };
        Mqtt::new(b, "deit", Box::new(|_| ())).err().unwrap().to_string()
    };
    let damaged = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for text in ["", "no certificate", damaged] {
        assert!(with(text).contains("ca.pem"), "{}", with(text));
    }
    let none = Broker { authorities: Some("/no/file".into()), ..broker("mqtts://broker.lan/yard").unwrap() };
    assert!(Mqtt::new(none, "deit", Box::new(|_| ())).err().unwrap().to_string().contains("/no/file"));
}

/// Takes one connection, acknowledges everything; the payloads, until the client ends.
fn accept(listener: &TcpListener, most: usize) -> Vec<String> {
    let (mut stream, _) = listener.accept().unwrap();
    let mut got = vec![];
    while got.len() < most {
        let mut head = [0; 1];
        if stream.read_exact(&mut head).is_err() {
            break;
        }
        let (mut length, mut shift) = (0usize, 0);
        loop {
            let mut digit = [0; 1];
            stream.read_exact(&mut digit).unwrap();
            length |= usize::from(digit[0] & 0x7F) << shift;
            shift += 7;
            if digit[0] < 0x80 {
                break;
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).unwrap();
        match head[0] {
            0x10 => stream.write_all(&[0x20, 2, 0, 0]).unwrap(),
            0x30..=0x3F => {
                let topic = usize::from(u16::from_be_bytes([body[0], body[1]]));
                let acknowledged = head[0] & 2 > 0;
                let after = 2 + topic + if acknowledged { 2 } else { 0 };
                if acknowledged {
                    stream.write_all(&[0x40, 2, body[2 + topic], body[3 + topic]]).unwrap();
                }
                let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
                got.push(format!("{} {}", text(&body[2..2 + topic]), text(&body[after..])));
            }
            _ => {}
        }
    }
    got
}

#[test]
fn a_broker_that_goes_away_loses_no_event() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // the first connection ends after four messages, in the middle of an answer
    let thread = std::thread::spawn(move || [accept(&listener, 4), accept(&listener, usize::MAX)]);
    let told = Arc::new(Mutex::new(vec![]));
    let tell = Arc::clone(&told);
    let place: Broker = format!("mqtt://127.0.0.1:{port}/door").parse().unwrap();
    let mut mqtt = Mqtt::new(place, "deit", Box::new(move |text| tell.lock().unwrap().push(text.to_string()))).unwrap();
    for seq in 0..4 {
        let events = vec![Event::new(Change::Entered, &format!("label{seq}"), 0.5)];
        mqtt.put(&Answer { seq, events, state: Some(format!("label{seq}")), ..answer() }).unwrap();
    }
    drop(mqtt);
    let [first, second] = thread.join().unwrap();
    assert_eq!(first[0], "door/availability online");
    assert!(first[1].starts_with("homeassistant/sensor/vedge-door/config {"), "{first:?}");
    let all = [first, second.clone()].concat();
    for seq in 0..4 {
        assert!(
            all.iter().any(|m| m.starts_with("door/event") && m.contains(&format!("label{seq}"))),
            "{seq}: {all:?}"
        );
        assert!(all.contains(&format!("door/state label{seq}")), "{seq}: {all:?}");
    }
    assert_eq!(second.last().unwrap(), "door/availability offline");
    let told = told.lock().unwrap();
    assert!(told.len() == 2 && told[0].contains("trying again") && told[1].contains("again"), "{told:?}");
}
