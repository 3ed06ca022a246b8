//! The form that a request's output must have: its grammar, compiled off the engine and followed at each draw.

use std::sync::{Arc, OnceLock};

use constraint::{Constraint, ConstraintError, Vocabulary};
use parking_lot::Mutex;
use tokio::sync::watch;
use tonic::Status;

/// A grammar on its way to being compiled. Who submits a request to an engine waits for it first: an engine that waited
/// would hold up every other sequence.
#[derive(Debug, Default)]
pub struct Form {
    compiled: OnceLock<Result<Constraint, ConstraintError>>,
    is_compiled: watch::Sender<bool>,
    lost: Mutex<Option<ConstraintError>>,
}

impl Form {
    /// Begins to compile.
    pub fn start(grammar: String, vocabulary: &Vocabulary) -> Arc<Self> {
        let form = Arc::new(Self::default());
        let (end, vocabulary) = (End(Arc::clone(&form)), vocabulary.clone());
        tokio::task::spawn_blocking(move || {
            let _ = end.0.compiled.set(vocabulary.compile(&grammar));
        });
        form
    }

    /// Resolves when draws can follow it, or will fail for it.
    pub async fn compiled(&self) {
        // The sender lives as long as this does.
        let _ = self.is_compiled.subscribe().wait_for(|done| *done).await;
    }

    /// Whether that is so now.
    pub fn is_compiled(&self) -> bool {
        *self.is_compiled.borrow()
    }

    /// Why its draws mean nothing any more, if so: the request must fail.
    pub fn failure(&self) -> Option<Status> {
        self.lost.lock().as_ref().map(|why| match why {
            ConstraintError::Grammar(_) => Status::invalid_argument(format!("sampling.grammar: {why}")),
            _ => Status::internal(why.to_string()),
        })
    }

    fn restrict(&self, choice: u32, output: &[u32], logits: &mut [f32]) -> Result<(), ConstraintError> {
        self.compiled.wait().as_ref().map_err(Clone::clone)?.restrict(choice, output, logits)
    }
}

impl engine::Constraint for Form {
    fn restrict(&self, choice: u32, output: &[u32], logits: &mut [f32]) {
        if let Err(why) = Form::restrict(self, choice, output, logits) {
            self.lost.lock().get_or_insert(why);
        }
    }
}

/// Whatever becomes of the compiling task, nobody waits for it for ever.
struct End(Arc<Form>);

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.0.compiled.set(Err(ConstraintError::Lost("this worker is stopping".into())));
        self.0.is_compiled.send_replace(true);
    }
}
