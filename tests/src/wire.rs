//! What crosses the loopback interface: every packet, put together to streams.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

/// Every protocol (`ETH_P_ALL`), as the kernel wants it.
const EVERYTHING: u16 = 0x0003;
const ETHERNET_BYTES: usize = 14;

/// Listens to the interfaces of this network namespace.
pub struct Capture {
    stop: Arc<AtomicBool>,
    reader: JoinHandle<Traffic>,
}

/// What was sent, by connection and direction.
#[derive(Default)]
pub struct Traffic {
    streams: BTreeMap<Ends, Stream>,
}

type Ends = (u16, u16);

#[derive(Default)]
struct Stream {
    bytes: Vec<u8>,
    next: Option<u32>,
}

impl Capture {
    /// Begins; None when this process may not.
    pub fn start() -> Option<Self> {
        let protocol = Protocol::from(i32::from(EVERYTHING.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol)).ok()?;
        // As much as the kernel gives: what does not fit is lost.
        let _ = socket.set_recv_buffer_size(256 << 20);
        socket.set_read_timeout(Some(Duration::from_millis(100))).ok()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let reader = std::thread::spawn(move || {
            let (mut traffic, mut packet) = (Traffic::default(), vec![0; 256 << 10]);
            // Until nothing more comes.
            loop {
                match (&socket).read(&mut packet) {
                    Ok(n) => {
                        traffic.packet(&packet[..n]);
                    }
                    Err(_) if stopped.load(Ordering::Relaxed) => return traffic,
                    Err(_) => {}
                }
            }
        });
        Some(Self { stop, reader })
    }

    /// Ends; what was seen.
    pub fn stop(self) -> Traffic {
        self.stop.store(true, Ordering::Relaxed);
        self.reader.join().unwrap()
    }
}

impl Traffic {
    /// An Ethernet frame with IPv4 and TCP; others are left out. Loopback shows each packet going out and coming in: what
    /// was there already is not taken again.
    fn packet(&mut self, frame: &[u8]) -> Option<()> {
        let ip = frame.get(ETHERNET_BYTES..)?;
        if frame.get(12..14)? != [0x08, 0x00] || *ip.get(9)? != 6 {
            return None;
        }
        let header = usize::from(ip.first()? & 0x0f) * 4;
        let total = usize::from(u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?));
        // Large segments on loopback may say 0.
        let end = if total == 0 { ip.len() } else { total.min(ip.len()) };
        let tcp = ip.get(header..end)?;
        let port = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
        let sequence = u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?);
        let payload = tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?;
        let is_syn = tcp.get(13)? & 0x02 != 0;
        let stream = self.streams.entry((port(0)?, port(2)?)).or_default();
        if is_syn {
            stream.next = Some(sequence.wrapping_add(1));
            return Some(());
        }
        let behind = stream.next.get_or_insert(sequence).wrapping_sub(sequence) as usize;
        // Seen before, wholly or in part; a sequence number from the future lies far behind.
        let fresh = match behind < 1 << 30 {
            true => payload.get(behind..)?,
            false => payload,
        };
        stream.bytes.extend_from_slice(fresh);
        stream.next = Some(sequence.wrapping_add(payload.len() as u32));
        Some(())
    }

    /// All bytes of all streams.
    pub fn bytes(&self) -> usize {
        self.streams.values().map(|stream| stream.bytes.len()).sum()
    }

    /// Streams that begin so.
    pub fn beginning_with(&self, start: &[u8]) -> Vec<&[u8]> {
        let streams = self.streams.values().map(|stream| stream.bytes.as_slice());
        streams.filter(|bytes| bytes.starts_with(start)).collect()
    }

    /// Whether some stream holds these bytes.
    pub fn holds(&self, needle: &[u8]) -> bool {
        let first = needle.first().copied().unwrap_or_default();
        self.streams.values().any(|stream| {
            let starts = stream.bytes.iter().enumerate().filter(|(_, byte)| **byte == first);
            starts.map(|(at, _)| at).any(|at| stream.bytes[at..].starts_with(needle))
        })
    }
}
