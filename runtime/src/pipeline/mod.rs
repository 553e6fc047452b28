//! Capture → preprocess → infer → sinks, each on a thread of its own; the newest frame wins.

mod mailbox;
mod report;
mod stages;

pub use report::{Report, Totals};

use crate::classify::{Classifier, Scores};
use crate::decide::{Decider, Rules};
use crate::error::{Error, Result};
use crate::model::card::Card;
use crate::preprocess::{Preprocessor, View};
use crate::session::Session;
use crate::sink::{Answer, Outlet};
use crate::source::FrameSource;
use mailbox::{Item, Mailbox, Taken};
use report::Window;
use stages::{Arrived, Prepared, Pulse};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Damaged frames in a row that are told, and that end a live source which is not to be started again.
const MANY_DAMAGED: u64 = 30;
/// A frame that nobody prepares for so long: the thread before the model hangs.
const STUCK: Duration = Duration::from_secs(10);

/// Session, preprocessing and classes of one model.
pub struct Model {
    session: Session,
    classifier: Classifier,
    card: Card,
}

impl Model {
    /// A classifier from a session.
    ///
    /// # Errors
    /// As [`Classifier::of`], and [`Error::Shape`] when the model's input is not what its card makes of a picture.
    pub fn new(session: Session) -> Result<Model> {
        let (classifier, card) = Classifier::of(&session)?;
        let p = &card.preprocess;
        let shape = [1, 3, p.height, p.width];
        match session.inputs() {
            [input] if input.shape == shape => Ok(Model { session, classifier, card }),
            inputs => {
                let has: Vec<String> = inputs.iter().map(|i| format!("`{}` {:?}", i.name, i.shape)).collect();
                let has = has.join(", ");
                Err(Error::Shape(format!("the card makes pictures into {shape:?}, the model's input is {has}")))
            }
        }
    }

    /// The model's card.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// Classifies a prepared frame; `seq` and `dropped` are left for the caller.
    fn answer(&mut self, prepared: Prepared, decider: &mut Decider, k: usize) -> Result<Answer> {
        let Prepared { frame, tensor, captured, preprocess } = prepared;
        let start = Instant::now();
        let distance = self.classifier.distance(&tensor);
        let outputs = self.session.run(&[tensor])?;
        let scores = Scores { distance, ..self.classifier.read(&outputs)? };
        let infer = start.elapsed();
        let events = decider.update(frame.at, &scores, &self.classifier);
        Ok(Answer {
            seq: 0,
            time: frame.time,
            source: frame.file.as_ref().map(|f| f.display().to_string()),
            capture: frame.capture,
            preprocess,
            infer,
            total: captured.elapsed(),
            latency: frame.at.elapsed(),
            top: self.classifier.top(&scores.probabilities, k),
            energy: scores.energy,
            distance: scores.distance,
            unknown: decider.unknown(&scores),
            state: decider.state().map(|i| self.classifier.label(i)),
            events,
            dropped: 0,
            frame: Some(frame),
        })
    }
}

/// When to end, and how to look.
#[derive(Clone, Debug)]
pub struct Options {
    /// Classes in an answer.
    pub top: usize,
    /// End after so many answers.
    pub max_frames: Option<u64>,
    /// Start a live source again when it fails, for ever; else its failure ends the run.
    pub retry: bool,
    /// What part of the picture is looked at, and how it is turned.
    pub view: View,
    /// When a class counts as seen.
    pub rules: Rules,
    /// How often latencies are reported.
    pub report_every: Option<Duration>,
}

impl Default for Options {
    /// Five classes, to the end of the source.
    fn default() -> Options {
        let (view, rules) = (View::default(), Rules::default());
        Options { top: 5, max_frames: None, retry: false, view, rules, report_every: None }
    }
}

/// What a run tells besides its answers.
#[derive(Debug)]
pub enum Notice {
    /// A file or frame is skipped.
    Skipped(Error),
    /// The source failed and is being started again.
    Lost(Error),
    /// It cannot be started again, for another reason than before.
    Failing(Error),
    /// It gives frames again; its description.
    Back(String),
    /// A thread before the model hangs, told once: from now on nothing says that the run goes on, [`Watcher::alive`].
    Hangs(&'static str),
    /// Latencies since the last report.
    Report(Report),
}

/// Follows a run.
pub trait Watcher {
    /// Something happened.
    fn notice(&mut self, notice: Notice);

    /// The run goes on: called many times a second, frames or none, also while a lost source is started again and again;
    /// but not when a thread hangs, be it in a call to a driver that does not come back.
    fn alive(&mut self, answers: u64);
}

/// What happened.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Answers given.
    pub answers: u64,
    /// Frames of a live source that newer ones overtook, or that were damaged.
    pub dropped: u64,
    /// Files that could not be read or decoded.
    pub failed: u64,
    /// Answers that a slow sink did not get.
    pub unsent: u64,
    /// Events that a sink never got.
    pub events_lost: u64,
    /// Frames to be kept that could not be written.
    pub unkept: u64,
    /// From the first frame to the end.
    pub elapsed: Duration,
}

/// Runs until the source ends, `max_frames` answers are given, `stop` is set or the reader of a sink goes away.
///
/// # Errors
/// When a live source fails (and is not to be started again), the model fails, or a sink cannot be written.
pub fn run(
    model: &mut Model,
    source: Box<dyn FrameSource>,
    outlets: Vec<Outlet>,
    options: &Options,
    totals: &Totals,
    stop: &AtomicBool,
    watcher: &mut dyn Watcher,
) -> Result<Summary> {
    let (live, single) = (source.is_live(), source.frames() == Some(1));
    let decider = Decider::new(options.rules.clone(), &model.classifier)?;
    let Started { frames, tensors, notices, pulse } = start(source, model.card.preprocess.clone(), options)?;
    // tells the threads before to end, whichever way this function is left
    let _closes = Closes(&tensors);
    let mut run = Run {
        model,
        decider,
        outlets,
        options,
        totals,
        watcher,
        frames,
        pulse,
        hangs: false,
        live,
        single,
        damaged: 0,
        dropped: 0,
    };
    let mut window = (Window::default(), Instant::now());
    let (mut began, mut elapsed) = (None, Duration::ZERO);
    let done = |totals: &Totals| options.max_frames.is_some_and(|most| totals.answers.load(Relaxed) >= most);
    while !stop.load(Relaxed) && !done(totals) {
        let taken = tensors.take();
        run.tell(&notices);
        match taken {
            Taken::Nothing => {}
            Taken::End(Some(error)) => return Err(error),
            Taken::End(None) => break,
            Taken::Item(item) => {
                let begin = *began.get_or_insert_with(Instant::now);
                let Some(latency) = run.one(item, stop)? else { break };
                // nobody empties a window that is not reported
                if options.report_every.is_some() {
                    window.0.add(latency.0, latency.1);
                }
                elapsed = begin.elapsed();
            }
        }
        if options.report_every.is_some_and(|every| window.1.elapsed() >= every) {
            let report = window.0.report(window.1.elapsed());
            run.watcher.notice(Notice::Report(report));
            window.1 = Instant::now();
        }
    }
    run.tell(&notices);
    run.finish()?;
    let count = |n: &std::sync::atomic::AtomicU64| n.load(Relaxed);
    let (answers, dropped) = (count(&totals.answers), count(&totals.dropped));
    let (failed, unsent, unkept) = (count(&totals.failed), count(&totals.unsent), count(&totals.unkept));
    let events_lost = count(&totals.events_lost);
    Ok(Summary { answers, dropped, failed, unsent, events_lost, unkept, elapsed })
}

/// What the threads before the model give.
struct Started {
    frames: Arc<Mailbox<Arrived>>,
    tensors: Arc<Mailbox<Prepared>>,
    notices: Receiver<Notice>,
    pulse: Arc<Pulse>,
}

/// Starts them.
fn start(source: Box<dyn FrameSource>, how: crate::model::card::Preprocess, options: &Options) -> Result<Started> {
    let live = source.is_live();
    let (frames, tensors) = (Arc::new(Mailbox::new(live)), Arc::new(Mailbox::new(live)));
    let (sender, notices) = channel();
    let pulse = Arc::new(Pulse::default());
    let (out, retry, beat) = (Arc::clone(&frames), options.retry, Arc::clone(&pulse));
    spawn("capture", move || stages::capture(source, retry, &out, &sender, &beat))?;
    let (from, out, how) = (Arc::clone(&frames), Arc::clone(&tensors), Preprocessor::new(how, options.view));
    spawn("preprocess", move || stages::prepare(how, &from, &out))?;
    Ok(Started { frames, tensors, notices, pulse })
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let failed = |e| Error::Source { what: format!("cannot start the thread {name}: {e}"), hint: String::new() };
    std::thread::Builder::new().name(name.into()).spawn(work).map(drop).map_err(failed)
}

struct Closes<'a>(&'a Mailbox<Prepared>);

impl Drop for Closes<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// The last stage: the model, what its scores mean, and where answers go.
struct Run<'a> {
    model: &'a mut Model,
    decider: Decider,
    outlets: Vec<Outlet>,
    options: &'a Options,
    totals: &'a Totals,
    watcher: &'a mut dyn Watcher,
    frames: Arc<Mailbox<Arrived>>,
    pulse: Arc<Pulse>,
    hangs: bool,
    live: bool,
    single: bool,
    /// Damaged frames in a row.
    damaged: u64,
    /// Frames dropped since the last answer.
    dropped: u64,
}

impl Run<'_> {
    /// Takes one frame; its latency and the frames dropped before it, or `None` when a sink's reader is gone.
    fn one(&mut self, item: Item<Prepared>, stop: &AtomicBool) -> Result<Option<(Duration, u64)>> {
        let totals = self.totals;
        self.dropped += item.dropped;
        totals.dropped.fetch_add(item.dropped, Relaxed);
        let answer = item.value.and_then(|prepared| self.model.answer(prepared, &mut self.decider, self.options.top));
        let answer = match answer {
            Ok(answer) => answer,
            Err(e) => return self.skip(e).map(|()| Some((Duration::ZERO, 0))),
        };
        self.damaged = 0;
        let dropped = std::mem::take(&mut self.dropped);
        let mut answer = Answer { seq: totals.answers.load(Relaxed), dropped, ..answer };
        for event in &mut answer.events {
            (event.seq, event.time) = (answer.seq, answer.time);
        }
        let latency = answer.latency;
        totals.events.fetch_add(answer.events.len() as u64, Relaxed);
        let answer = Arc::new(answer);
        for outlet in &self.outlets {
            if !outlet.give(&answer, !self.live, stop, totals)? {
                return Ok(None);
            }
        }
        totals.answers.fetch_add(1, Relaxed);
        Ok(Some((latency, dropped)))
    }

    /// One damaged frame, or file among others, is no reason to stop.
    fn skip(&mut self, e: Error) -> Result<()> {
        if !is_picture_error(&e) || self.single || (self.live && !self.options.retry && self.damaged >= MANY_DAMAGED) {
            return Err(e);
        }
        if self.live {
            (self.damaged, self.dropped) = (self.damaged + 1, self.dropped + 1);
            self.totals.dropped.fetch_add(1, Relaxed);
            self.totals.damaged.fetch_add(1, Relaxed);
        } else {
            self.totals.failed.fetch_add(1, Relaxed);
        }
        if !self.live || self.damaged % MANY_DAMAGED == 1 {
            self.watcher.notice(Notice::Skipped(e));
        }
        Ok(())
    }

    fn tell(&mut self, notices: &Receiver<Notice>) {
        for notice in notices.try_iter() {
            if let Notice::Lost(_) = notice {
                self.totals.lost.fetch_add(1, Relaxed);
            }
            match notice {
                Notice::Lost(_) | Notice::Failing(_) => self.totals.is_lost.store(true, Relaxed),
                Notice::Back(_) => self.totals.is_lost.store(false, Relaxed),
                Notice::Skipped(_) | Notice::Report(_) | Notice::Hangs(_) => {}
            }
            self.watcher.notice(notice);
        }
        let hangs = match (self.pulse.is_stuck(), self.frames.is_stuck(STUCK)) {
            (false, false) => None,
            (true, _) => Some("capture"),
            (false, true) => Some("preprocess"),
        };
        match hangs {
            None => self.watcher.alive(self.totals.answers.load(Relaxed)),
            Some(thread) if !self.hangs => self.watcher.notice(Notice::Hangs(thread)),
            Some(_) => {}
        }
        self.hangs = hangs.is_some();
    }

    /// Waits until what was given is written.
    fn finish(&mut self) -> Result<()> {
        self.outlets.drain(..).try_for_each(|outlet| outlet.finish(self.totals))
    }
}

/// Whether only this frame is lost.
fn is_picture_error(e: &Error) -> bool {
    match e {
        Error::Picture(_) | Error::Read { .. } => true,
        Error::InFile { error, .. } => is_picture_error(error),
        _ => false,
    }
}
