//! The command line of onnx-mabert: arguments, progress and printing. What is done is done in the libraries.

mod arguments;
mod commands;
mod engine;
mod failure;
mod print;
mod progress;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let arguments = arguments::Arguments::parse();
    let global = &arguments.global;
    let level = match (global.quiet, global.verbose) {
        (true, _) => tracing_subscriber::filter::LevelFilter::OFF,
        (_, 0) => tracing_subscriber::filter::LevelFilter::WARN,
        (_, 1) => tracing_subscriber::filter::LevelFilter::INFO,
        _ => tracing_subscriber::filter::LevelFilter::DEBUG,
    };
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).without_time().init();
    // tract's panics are caught and become errors; what they print on the way would only confuse.
    if global.verbose == 0 {
        std::panic::set_hook(Box::new(|_| {}));
    }
    let result = std::panic::catch_unwind(|| {
        rayon::ThreadPoolBuilder::new().num_threads(global.threads()).build_global()?;
        commands::run(&arguments.command, global)
    });
    let result = result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let text = text.unwrap_or("no message");
        Err(anyhow::anyhow!("internal error: {text}; please report it, with the model if you can (-v shows where)"))
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = failure::exit_code(&error);
            let message = failure::message(&error);
            eprintln!("error: {message}");
            if global.json && !failure::is_reported(&error) {
                println!("{}", serde_json::json!({ "error": message, "exit_code": code }));
            }
            ExitCode::from(code)
        }
    }
}
