//! The form that a client wants its output to have, as one grammar, tried before a worker sees it.

use constraint::{ConstraintError, lark};
use proto::v1::{self, constraint::Form, tool_choice::Mode};
use tonic::Status;

use crate::text::model::TextModel;
use crate::text::tools::{self, ToolFormat};

/// Texts that one may choose from.
const MAX_CHOICES: usize = 1024;

/// What a request says about the form of its output.
#[derive(Debug, Clone, Default)]
pub struct OutputForm {
    /// The grammar to follow; empty for none.
    pub grammar: String,
    /// Calls that are looked for in the text, and how they are written.
    pub tools: Option<(ToolFormat, Vec<v1::Tool>)>,
}

impl OutputForm {
    /// Of a request's constraint and its conversation. Compiles the grammar: off the async threads.
    pub fn of(
        constraint: Option<v1::Constraint>,
        chat: Option<&v1::ChatMessages>,
        text: &TextModel,
    ) -> Result<Self, Status> {
        let grammar = match constraint.and_then(|constraint| constraint.form) {
            Some(form) => grammar_of(form)?,
            None => String::new(),
        };
        let mut form = Self { grammar, tools: None };
        let with_tools = chat.filter(|chat| !chat.tools.is_empty() && mode(chat) != Mode::None);
        if let Some(chat) = with_tools {
            form.tools = Some((text.tool_format(), chat.tools.clone()));
            if mode(chat) == Mode::Required {
                form.require_call(chat, text)?;
            }
        }
        if !form.grammar.is_empty() {
            text.vocabulary.compile(&form.grammar).map_err(|why| match why {
                ConstraintError::Grammar(why) => invalid(format!("sampling.constraint: {why}")),
                other => Status::failed_precondition(other.to_string()),
            })?;
        }
        Ok(form)
    }

    fn require_call(&mut self, chat: &v1::ChatMessages, text: &TextModel) -> Result<(), Status> {
        if !self.grammar.is_empty() {
            return Err(invalid("tool_choice: required, and sampling.constraint: only one can hold".into()));
        }
        self.grammar = tools::of_required_call(chat, text.tool_format(), |token| text.token_id(token))
            .map_err(invalid)?;
        Ok(())
    }
}

fn grammar_of(form: Form) -> Result<String, Status> {
    let named = |field: &str, why: String| invalid(format!("sampling.constraint.{field}: {why}"));
    match form {
        Form::JsonSchema(schema) => lark::json_schema(&schema).map_err(|why| named("json_schema", why)),
        Form::JsonObject(true) => Ok(lark::json_object()),
        Form::JsonObject(false) => Ok(String::new()),
        Form::Regex(pattern) if pattern.is_empty() => Err(named("regex", "empty".into())),
        Form::Regex(pattern) => Ok(lark::regex(&pattern)),
        Form::Grammar(grammar) if grammar.is_empty() => Err(named("grammar", "empty".into())),
        Form::Grammar(grammar) => Ok(grammar),
        Form::Choice(choice) => match choice.texts.len() {
            1..=MAX_CHOICES if choice.texts.iter().all(|text| !text.is_empty()) => {
                Ok(lark::choice(&choice.texts))
            }
            count => Err(named("choice", format!("{count} texts, 1 to {MAX_CHOICES}, none of them empty"))),
        },
    }
}

fn mode(chat: &v1::ChatMessages) -> Mode {
    chat.tool_choice.as_ref().map_or(Mode::Auto, |choice| choice.mode())
}

fn invalid(why: String) -> Status {
    Status::invalid_argument(why)
}
