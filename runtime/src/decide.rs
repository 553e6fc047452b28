//! From scores of single frames to what is there: smoothed over time, with hysteresis, or nothing known.

use crate::classify::{Classifier, Scores};
use crate::error::{Error, Result};
use std::time::{Duration, Instant, SystemTime};

/// When a class counts as seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// Time constant of the smoothing: after this long a change has had 63 % of its effect. 0 is none.
    pub smooth: Duration,
    /// Smoothed probability from which a class is there.
    pub threshold: f32,
    /// The same for single labels.
    pub thresholds: Vec<(String, f32)>,
    /// How far below its threshold a class that is there may fall.
    pub hysteresis: f32,
    /// Energy above which a frame shows none of the classes; see [`Scores::energy`].
    pub max_energy: Option<f32>,
    /// A frame whose best class is less likely than this shows none of the classes.
    pub min_confidence: Option<f32>,
    /// A frame that looks farther than this from the calibration pictures shows none of the classes; see
    /// [`Scores::distance`].
    pub max_distance: Option<f32>,
}

impl Default for Rules {
    fn default() -> Rules {
        let smooth = Duration::from_millis(500);
        let (max_energy, min_confidence, max_distance) = (None, None, None);
        Rules { smooth, threshold: 0.5, thresholds: vec![], hysteresis: 0.1, max_energy, min_confidence, max_distance }
    }
}

/// A class came or went.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Event {
    /// Number of the answer that brought it; an event may travel with a later one to a slow sink.
    #[serde(skip)]
    pub seq: u64,
    /// When that answer's frame was captured.
    #[serde(skip)]
    pub time: SystemTime,
    /// What happened.
    pub event: Change,
    /// Which class.
    pub label: String,
    /// Its smoothed probability, 0…1.
    pub p: f32,
}

impl Event {
    /// An event whose answer is not known yet.
    pub fn new(event: Change, label: &str, p: f32) -> Event {
        Event { seq: 0, time: SystemTime::UNIX_EPOCH, event, label: label.into(), p }
    }
}

/// What can happen to a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// It is there now.
    Entered,
    /// It is there no more.
    Left,
}

/// Keeps what was seen.
pub struct Decider {
    rules: Rules,
    /// Threshold of each class; empty before the first frame.
    thresholds: Vec<f32>,
    smoothed: Vec<f32>,
    last: Option<Instant>,
    state: Option<usize>,
}

impl Decider {
    /// Nothing seen yet.
    ///
    /// # Errors
    /// [`Error::Usage`] for a label that the model does not have, numbers out of range, and an energy where the model
    /// gives none.
    pub fn new(rules: Rules, classifier: &Classifier) -> Result<Decider> {
        let usage = |what: String, hint: &str| Error::Usage { what, hint: hint.into() };
        let shares = rules.thresholds.iter().map(|t| t.1).chain([rules.threshold, rules.hysteresis]);
        if let Some(bad) = shares.chain(rules.min_confidence).find(|s| !(0.0..=1.0).contains(s)) {
            let what = format!("threshold, hysteresis or confidence {bad}: expected a number between 0 and 1");
            return Err(usage(what, ""));
        }
        for (label, _) in &rules.thresholds {
            if !classifier.labels().contains(label) {
                let known = classifier.labels().iter().take(20).cloned().collect::<Vec<_>>().join(", ");
                return Err(usage(format!("the model has no label `{label}`"), &format!("it has {known}")));
            }
        }
        if rules.max_energy.is_some() && classifier.gives_probabilities() {
            return Err(usage("an energy limit needs logits, the model gives probabilities".into(), "use a threshold"));
        }
        Ok(Decider { rules, thresholds: vec![], smoothed: vec![], last: None, state: None })
    }

    /// Whether a frame shows none of the classes; `None` where no rule says when it does.
    pub fn unknown(&self, scores: &Scores) -> Option<bool> {
        let best = scores.probabilities.iter().copied().fold(0.0, f32::max);
        let energy = self.rules.max_energy.zip(scores.energy).map(|(most, energy)| energy > most);
        let unsure = self.rules.min_confidence.map(|least| best < least);
        let strange = self.rules.max_distance.zip(scores.distance).map(|(most, distance)| distance > most);
        energy.into_iter().chain(unsure).chain(strange).reduce(|a, b| a || b)
    }

    /// Takes one frame's scores; what came and went by them. After a gap of many time constants the past counts nothing.
    pub fn update(&mut self, at: Instant, scores: &Scores, classifier: &Classifier) -> Vec<Event> {
        let unknown = self.unknown(scores) == Some(true);
        let seen = |i: usize| if unknown { 0.0 } else { scores.probabilities[i] };
        if self.smoothed.len() == scores.probabilities.len() {
            let passed = self.last.map_or(Duration::ZERO, |last| at.saturating_duration_since(last));
            let constant = self.rules.smooth.as_secs_f32();
            let weight = if constant > 0.0 { 1.0 - (-passed.as_secs_f32() / constant).exp() } else { 1.0 };
            for (i, s) in self.smoothed.iter_mut().enumerate() {
                *s += (seen(i) - *s) * weight;
            }
        } else {
            self.smoothed = (0..scores.probabilities.len()).map(seen).collect();
            let own = |label: &str| self.rules.thresholds.iter().find(|t| t.0 == label).map(|t| t.1);
            let threshold = |i| own(&classifier.label(i)).unwrap_or(self.rules.threshold);
            self.thresholds = (0..self.smoothed.len()).map(threshold).collect();
        }
        self.last = Some(at);
        let next = self.next();
        let event = |event, i: usize| Event::new(event, &classifier.label(i), self.smoothed[i]);
        let mut events = vec![];
        if next != self.state {
            events.extend(self.state.map(|i| event(Change::Left, i)));
            events.extend(next.map(|i| event(Change::Entered, i)));
            self.state = next;
        }
        events
    }

    /// What is there, by the smoothed probabilities.
    fn next(&self) -> Option<usize> {
        let passes = |&i: &usize| self.smoothed[i] >= self.thresholds[i];
        let best =
            (0..self.smoothed.len()).filter(passes).max_by(|&a, &b| self.smoothed[a].total_cmp(&self.smoothed[b]));
        let Some(now) = self.state else { return best };
        let better = best.filter(|&b| self.smoothed[b] > self.smoothed[now] + self.rules.hysteresis);
        let stays = self.smoothed[now] >= self.thresholds[now] - self.rules.hysteresis;
        if let Some(b) = better {
            Some(b)
        } else if stays {
            Some(now)
        } else {
            best
        }
    }

    /// The class that is there.
    pub fn state(&self) -> Option<usize> {
        self.state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classifier() -> Classifier {
        Classifier::for_tests(&["cat", "dog", "bird"])
    }

    /// What is told for probabilities of cat and dog, a frame every 100 ms.
    fn told(rules: Rules, frames: &[(f32, f32)]) -> Vec<String> {
        let (classifier, start) = (classifier(), Instant::now());
        let mut decider = Decider::new(rules, &classifier).unwrap();
        let mut told = vec![];
        for (n, &(cat, dog)) in frames.iter().enumerate() {
            let (energy, distance) = (Some(-1.0 - cat), Some(dog * 10.0));
            let scores = Scores { probabilities: vec![cat, dog, 1.0 - cat - dog], energy, distance };
            for e in decider.update(start + Duration::from_millis(100) * n as u32, &scores, &classifier) {
                told.push(format!("{n} {:?} {}", e.event, e.label));
            }
        }
        told
    }

    fn at_once() -> Rules {
        Rules { smooth: Duration::ZERO, ..Rules::default() }
    }

    #[test]
    fn entering_and_leaving_with_hysteresis() {
        let frames = [(0.3, 0.3), (0.6, 0.1), (0.45, 0.2), (0.35, 0.3), (0.1, 0.8), (0.8, 0.1)];
        let want = ["1 Entered cat", "3 Left cat", "4 Entered dog", "5 Left dog", "5 Entered cat"];
        assert_eq!(told(at_once(), &frames), want);
    }

    #[test]
    fn flicker_is_smoothed_away() {
        let flicker: Vec<(f32, f32)> = (0..40).map(|n| if n % 2 == 0 { (0.9, 0.05) } else { (0.4, 0.55) }).collect();
        assert!(told(at_once(), &flicker).len() > 30);
        assert_eq!(told(Rules::default(), &flicker), ["0 Entered cat"]);
    }

    #[test]
    fn labels_have_thresholds_of_their_own() {
        let rules = Rules { thresholds: vec![("dog".into(), 0.9)], ..at_once() };
        assert_eq!(told(rules, &[(0.1, 0.8), (0.02, 0.95)]), ["1 Entered dog"]);
    }

    #[test]
    fn high_energy_is_none_of_these() {
        let rules = Rules { max_energy: Some(-1.7), ..at_once() };
        assert_eq!(told(rules, &[(0.6, 0.1), (0.9, 0.1), (0.6, 0.1)]), ["1 Entered cat", "2 Left cat"]);
    }

    #[test]
    fn a_frame_that_looks_strange_is_none_of_these() {
        let rules = Rules { max_distance: Some(3.0), ..at_once() };
        assert_eq!(
            told(rules, &[(0.6, 0.1), (0.6, 0.35), (0.6, 0.1)]),
            ["0 Entered cat", "1 Left cat", "2 Entered cat"]
        );
    }

    #[test]
    fn an_unsure_frame_is_none_of_these() {
        // below the threshold for coming, above the one for staying
        let rules = || Rules { threshold: 0.6, hysteresis: 0.3, ..at_once() };
        let frames = [(0.9, 0.0), (0.4, 0.3), (0.9, 0.0)];
        assert_eq!(told(rules(), &frames), ["0 Entered cat"]);
        let unsure = Rules { min_confidence: Some(0.5), ..rules() };
        assert_eq!(told(unsure, &frames), ["0 Entered cat", "1 Left cat", "2 Entered cat"]);
    }

    #[test]
    fn either_limit_makes_a_frame_unknown() {
        let of = |max_energy, min_confidence, energy| {
            let decider = Decider::new(Rules { max_energy, min_confidence, ..at_once() }, &classifier()).unwrap();
            decider.unknown(&Scores { probabilities: vec![0.5, 0.25, 0.25], energy: Some(energy), distance: None })
        };
        assert_eq!(of(None, None, 0.0), None);
        assert_eq!(of(Some(-1.0), None, 0.0), Some(true));
        assert_eq!(of(Some(1.0), Some(0.4), 0.0), Some(false));
        assert_eq!(of(Some(1.0), Some(0.6), 0.0), Some(true));
    }

    #[test]
    fn rules_that_do_not_fit_the_model() {
        let wrong = |rules| Decider::new(rules, &classifier()).err().unwrap().to_string();
        assert!(wrong(Rules { thresholds: vec![("cow".into(), 0.5)], ..Rules::default() }).contains("cow"));
        assert!(wrong(Rules { threshold: 1.5, ..Rules::default() }).contains("1.5"));
        assert!(wrong(Rules { hysteresis: f32::NAN, ..Rules::default() }).contains("NaN"));
    }
}
