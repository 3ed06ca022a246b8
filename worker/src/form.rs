//! The form that a request's output must have: its grammar, compiled beside the prefill and followed at each draw.

use std::sync::{Arc, OnceLock};

use constraint::{Constraint, ConstraintError, Vocabulary};
use parking_lot::Mutex;
use tonic::Status;

/// A grammar on its way to being compiled; the engine waits for it only if its first draw comes sooner.
#[derive(Debug, Default)]
pub struct Form {
    compiled: OnceLock<Result<Constraint, ConstraintError>>,
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
    }
}
