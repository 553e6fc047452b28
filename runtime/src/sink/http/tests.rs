use super::*;
use crate::decide::{Change, Event};
use crate::preprocess::Picture;
use crate::sink::tests::answer;
use crate::source::{Frame, Pixels};

fn shown(token: Option<&str>) -> (Http, SocketAddr) {
    Http::listen("127.0.0.1:0".parse().unwrap(), token.map(Into::into), Arc::default()).unwrap()
}

fn with_frame(seq: u64) -> Answer {
    let pixels = Pixels::Picture(Picture { width: 16, height: 8, rgb: vec![seq as u8; 384] });
    let frame = Frame::taken(pixels, Instant::now(), Duration::ZERO);
    let events = vec![Event { seq, ..Event::new(Change::Entered, &format!("class{seq}"), 0.5) }];
    Answer { seq, frame: Some(Arc::new(frame)), events, ..answer() }
}

/// Asks for a path; what comes until the other side ends, or `most` bytes.
fn get(at: SocketAddr, target: &str, headers: &str, most: usize) -> Vec<u8> {
    let mut stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(format!("GET {target} HTTP/1.1\r\n{headers}\r\n").as_bytes()).unwrap();
    let mut got = vec![];
    stream.take(most as u64).read_to_end(&mut got).unwrap();
    got
}

fn text(at: SocketAddr, target: &str) -> String {
    String::from_utf8_lossy(&get(at, target, "Host: localhost\r\n", 1 << 20)).into_owned()
}

#[test]
fn page_snapshot_health_and_metrics() {
    let (mut http, at) = shown(None);
    assert!(text(at, "/").contains("<title>vedge</title>"));
    assert!(text(at, "/healthz").starts_with("HTTP/1.1 200") && text(at, "/none").starts_with("HTTP/1.1 404"));
    http.put(&with_frame(1)).unwrap();
    let jpeg = get(at, "/snapshot.jpg", "Host: 127.0.0.1\r\n", 1 << 20);
    let body = jpeg.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    let picture = crate::preprocess::decode_bytes(&jpeg[body..]).unwrap();
    assert_eq!((picture.width, picture.height), (16, 8));
    let metrics = text(at, "/metrics");
    for line in [
        "vedge_latency_seconds_bucket{le=\"0.01\"} 0",
        "vedge_latency_seconds_bucket{le=\"0.02\"} 1",
        "vedge_source_up 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}

#[test]
fn events_and_pictures_flow() {
    let (mut http, at) = shown(None);
    for seq in 0..3 {
        http.put(&with_frame(seq)).unwrap();
    }
    let head = String::from_utf8_lossy(&get(at, "/events", "Host: [::1]:80\r\n", 1100)).into_owned();
    assert!(
        head.contains("event: change\ndata: {\"v\":1") && head.contains("class0") && head.contains("class2"),
        "{head}"
    );
    assert!(head.contains("\n\ndata: {\"v\":1,\"seq\":2"), "{head}");
    let part = get(at, "/stream.mjpg", "Host: localhost\r\n", 700);
    assert!(part.windows(2).any(|w| w == [0xFF, 0xD8]), "no picture");
}

#[test]
fn who_may_look() {
    let remote = Http::listen("0.0.0.0:0".parse().unwrap(), None, Arc::default());
    assert!(matches!(remote, Err(Error::Usage { .. })));
    let (_http, at) = shown(Some("secret"));
    assert!(text(at, "/metrics").starts_with("HTTP/1.1 401") && text(at, "/?token=secreT").starts_with("HTTP/1.1 401"));
    assert!(text(at, "/?token=secret").starts_with("HTTP/1.1 200"));
    let bearer = get(at, "/healthz", "Authorization: Bearer secret\r\n", 64);
    assert!(bearer.starts_with(b"HTTP/1.1 200"));
    let (_http, at) = shown(None);
    let rebound = get(at, "/", "Host: evil.example\r\n", 64);
    assert!(rebound.starts_with(b"HTTP/1.1 403"));
}

#[test]
fn clients_that_do_nothing_are_limited_and_slow_nothing() {
    let (mut http, at) = shown(None);
    let idle: Vec<TcpStream> = (0..CLIENTS).map(|_| TcpStream::connect(at).unwrap()).collect();
    std::thread::sleep(Duration::from_millis(100));
    assert!(text(at, "/").starts_with("HTTP/1.1 503"));
    let start = Instant::now();
    for seq in 0..100 {
        http.put(&with_frame(seq)).unwrap();
    }
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    drop(idle);
    std::thread::sleep(Duration::from_millis(200));
    assert!(text(at, "/").starts_with("HTTP/1.1 200"));
}

#[test]
fn a_client_that_was_away_for_too_long_is_told_what_it_missed() {
    let board = board::Board::new(Arc::default());
    board.show(&with_frame(0));
    let (mut seen, mut changes) = (0, 0);
    assert_eq!(board.news(&mut seen, &mut changes).unwrap().missed, 0);
    for seq in 1..=250 {
        board.show(&with_frame(seq));
    }
    let news = board.news(&mut seen, &mut changes).unwrap();
    assert_eq!((news.events.len(), news.missed), (200, 50));
    // one that comes late has the last 200
    let news = board.news(&mut 0, &mut 0).unwrap();
    assert_eq!((news.events.len(), news.missed), (200, 0));
}
