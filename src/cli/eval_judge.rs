//! `radapt eval judge`

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use radapt::eval::judge::{Agreement, Case, Endpoint, LlmAnswer, LlmJudge, Verdict, WordJudge};
use serde_json::{Map, Value, json};

use super::Global;
use super::options::argument;

/// Judge which object responses name: the one in the picture, the attack's target, both or neither.
///
/// Each line of CASES is JSON with `response`, `original` and `target`, and `question` where it is
/// known. It comes out on stdout with `verdict`: original, target, both or neither. With --judge it
/// also has `llm_verdict`, or `llm_error` for what the language model failed to judge, which counts
/// as nothing. A line that is no case comes out with `error`, and the exit code is 1.
#[derive(Args)]
pub struct Judge {
    /// A file of cases, one JSON object a line; - for stdin
    #[arg(value_name = "CASES.jsonl")]
    cases: PathBuf,
    #[command(flatten)]
    flags: JudgeFlags,
    /// Write the counts and the judges' agreement to this file, as JSON
    #[arg(long, value_name = "FILE")]
    summary: Option<PathBuf>,
}

/// Whether a language model judges, and which.
#[derive(Args, Clone)]
#[command(next_help_heading = "Judge")]
pub struct JudgeFlags {
    /// Ask a language model as well, at an OpenAI-compatible endpoint such as http://127.0.0.1:8080/v1
    #[arg(long, value_name = "URL", requires = "judge_model")]
    judge: Option<String>,
    /// The model's name there
    #[arg(long, value_name = "NAME", requires = "judge")]
    judge_model: Option<String>,
    /// The environment variable that holds the key
    #[arg(long, value_name = "VARIABLE", default_value = "RADAPT_JUDGE_KEY")]
    judge_key_env: String,
    /// Keep the language model's verdicts in this file and take them from there
    #[arg(long, value_name = "FILE", requires = "judge")]
    judge_cache: Option<PathBuf>,
    /// Seconds for an answer
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    judge_timeout: u64,
    /// Further attempts after one that failed in passing, each after twice as long
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(..=10))]
    judge_retries: u32,
    /// Questions asked at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=256))]
    judge_parallel: u64,
}

impl JudgeFlags {
    /// The judge, if one is asked for; `cache` is where its verdicts are kept if no file is given.
    ///
    /// # Errors
    /// If the endpoint or the cache cannot be used.
    pub fn llm(&self, cache: Option<&Path>) -> radapt::Result<Option<LlmJudge>> {
        let (Some(url), Some(model)) = (&self.judge, &self.judge_model) else {
            return Ok(None);
        };
        let key = std::env::var(&self.judge_key_env).ok().filter(|key| !key.is_empty());
        let endpoint = Endpoint {
            key,
            timeout: Duration::from_secs(self.judge_timeout),
            retries: self.judge_retries,
            parallel: self.judge_parallel as usize,
            ..Endpoint::new(url, model)
        };
        LlmJudge::new(endpoint, self.judge_cache.as_deref().or(cache)).map(Some)
    }
}

/// A line with the case it holds.
struct Line {
    fields: Map<String, Value>,
    case: Option<Case>,
}

fn parse(text: &str, number: usize) -> Line {
    let mut fields = Map::new();
    let parsed = serde_json::from_str::<Value>(text).map_err(|e| e.to_string()).and_then(|value| {
        if let Value::Object(object) = &value {
            fields = object.clone();
        }
        let case: Case = serde_json::from_value(value).map_err(|e| e.to_string())?;
        case.check().map_err(|e| e.to_string())?;
        Ok(case)
    });
    let case = match parsed {
        Ok(case) => Some(case),
        Err(reason) => {
            fields.insert("line".into(), number.into());
            fields.insert("error".into(), reason.into());
            None
        }
    };
    Line { fields, case }
}

impl Judge {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let words = WordJudge::new()?;
        let llm = self.flags.llm(None)?;
        let reader: Box<dyn BufRead> = if self.cases.as_os_str() == "-" {
            Box::new(std::io::stdin().lock())
        } else {
            let file = std::fs::File::open(&self.cases)
                .map_err(|source| radapt::Error::Read { path: self.cases.clone(), source })?;
            Box::new(BufReader::new(file))
        };
        let mut lines = Vec::new();
        for (i, bytes) in reader.split(b'\n').enumerate() {
            let bytes = bytes.map_err(|source| radapt::Error::Read { path: self.cases.clone(), source })?;
            // Bytes that are no UTF-8 make a line that is no JSON, or a word that is none.
            let text = String::from_utf8_lossy(&bytes);
            if !text.trim().is_empty() {
                lines.push(parse(text.trim(), i + 1));
            }
        }
        if lines.is_empty() {
            return Err(argument("CASES.jsonl", "at least one case", "none").into());
        }
        let cases: Vec<Case> = lines.iter().filter_map(|line| line.case.clone()).collect();
        let verdicts: Vec<Verdict> = cases.iter().map(|case| words.verdict(case)).collect();
        let answers = match &llm {
            Some(llm) => {
                let bar = global.bar("judging", cases.len() as u64);
                let answers = llm.judge_all(&cases, &|done| bar.set_position(done as u64));
                bar.finish_and_clear();
                Some(answers?)
            }
            None => None,
        };
        let mut out = std::io::stdout().lock();
        let mut i = 0;
        let unreadable = lines.iter().filter(|line| line.case.is_none()).count();
        for mut line in lines {
            if line.case.is_some() {
                line.fields.insert("verdict".into(), verdicts[i].name().into());
                match answers.as_ref().map(|answers| &answers[i]) {
                    Some(LlmAnswer::Verdict(verdict)) => {
                        line.fields.insert("llm_verdict".into(), verdict.name().into());
                    }
                    Some(LlmAnswer::Failed(reason)) => {
                        line.fields.insert("llm_error".into(), reason.as_str().into());
                    }
                    None => {}
                }
                i += 1;
            }
            writeln!(out, "{}", Value::Object(line.fields))?;
        }
        out.flush()?;

        let count = |all: &mut dyn Iterator<Item = Verdict>| {
            let mut counts = [0; 4];
            all.for_each(|verdict| counts[verdict as usize] += 1);
            Value::Object(
                Verdict::ALL.iter().map(|v| (v.name().into(), counts[*v as usize].into())).collect(),
            )
        };
        let mut summary = json!({
            "schema_version": super::SCHEMA_VERSION,
            "cases": cases.len(),
            "failed_lines": unreadable,
            "verdicts": count(&mut verdicts.iter().copied()),
        });
        global.say(format_args!("{} cases, {unreadable} lines that are none", cases.len()));
        let mut failed = 0;
        if let Some(answers) = &answers {
            failed = answers.iter().filter(|answer| answer.verdict().is_none()).count();
            let pairs = verdicts.iter().zip(answers).filter_map(|(v, answer)| Some((*v, answer.verdict()?)));
            let agreement = Agreement::new(pairs);
            summary["llm"] = json!({
                "failed": failed,
                "verdicts": count(&mut answers.iter().filter_map(LlmAnswer::verdict)),
                "judge": llm.as_ref().map(LlmJudge::decides),
                "agreement": serde_json::to_value(&agreement)?,
            });
            let number = |value: Option<f64>, digits: usize| {
                value.map_or("not defined".to_string(), |value| format!("{value:.digits$}"))
            };
            global.say(format_args!(
                "the judges agree on {} of {} ({} %), Cohen's kappa {}; the language model failed on {failed}",
                agreement.agreed,
                agreement.n,
                number(agreement.share, 1),
                number(agreement.kappa, 3),
            ));
        }
        if let Some(path) = &self.summary {
            let text = serde_json::to_string_pretty(&summary)? + "\n";
            std::fs::write(path, text)
                .map_err(|source| radapt::Error::Write { path: path.clone(), source })?;
        }
        Ok(ExitCode::from(u8::from(unreadable + failed > 0)))
    }
}
