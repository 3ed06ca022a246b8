//! Ctrl-C and SIGTERM: the first drains, the second ends at once.

use tokio_util::sync::CancellationToken;

/// Cancelled by the first SIGINT or SIGTERM; the second exits the process with 130.
pub fn stop_token() -> CancellationToken {
    let stop = CancellationToken::new();
    let cancel = stop.clone();
    tokio::spawn(async move {
        wait().await;
        eprintln!("stopping: running requests may end (again to stop at once)");
        cancel.cancel();
        wait().await;
        // Not `exit`: handlers of libraries would take down what engine threads still use.
        // SAFETY: it runs nothing and does not return.
        unsafe { libc::_exit(130) };
    });
    stop
}

/// Cancels `stop` when standard input ends: the parent that holds its other end is gone.
pub fn stop_with_parent(stop: CancellationToken) {
    // A thread of its own: reads of standard input cannot be cancelled.
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        stop.cancel();
    });
}

/// Resolves on the next SIGINT or SIGTERM.
pub async fn wait() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}
