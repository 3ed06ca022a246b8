//! A sender made of bare frames, for what an honest one never does.

use bytes::Bytes;
use kv_transport::Identity;
use kv_transport::ticket::Ticket;
use kv_transport::wire::{CellDescriptor, HEADER_BYTES, Header, Hello, HelloAck, Kind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Pair, identity, soon};

pub struct Raw {
    pub stream: TcpStream,
}

/// The secret inside an encoded ticket: behind magic, version and transfer id.
fn secret(ticket: &Bytes) -> [u8; 16] {
    ticket[22..38].try_into().unwrap()
}

impl Raw {
    pub async fn dial(pair: &Pair, from: Identity, to: Identity) -> (Self, HelloAck) {
        let mut stream = TcpStream::connect(pair.address).await.unwrap();
        stream.write_all(&Hello { from, to }.encode().unwrap()).await.unwrap();
        let mut len = [0; 2];
        stream.read_exact(&mut len).await.unwrap();
        let mut body = vec![0; usize::from(u16::from_le_bytes(len)) + 4];
        stream.read_exact(&mut body).await.unwrap();
        let ack = HelloAck::parse(&body[..body.len() - 4]).unwrap();
        (Self { stream }, ack)
    }

    pub async fn connect(pair: &Pair) -> Self {
        let (raw, ack) = Self::dial(pair, identity("raw", 1), identity("decode", 1)).await;
        assert_eq!(ack.refused, None);
        raw
    }

    /// Connected, with the ticket shown and accepted.
    pub async fn attached(pair: &Pair, ticket: &Bytes) -> (Self, u128) {
        let mut raw = Self::connect(pair).await;
        raw.attach(ticket, secret(ticket)).await;
        let reply = raw.hear().await;
        assert_eq!(reply.kind, Kind::Attached);
        (raw, reply.transfer)
    }

    pub async fn attach(&mut self, ticket: &Bytes, secret: [u8; 16]) {
        let ticket = Ticket::decode(ticket).unwrap();
        let mut body = secret.to_vec();
        body.extend(ticket.generation.to_le_bytes());
        body.extend(ticket.attempt.to_le_bytes());
        self.say(Header::bare(Kind::Attach, ticket.transfer, 9, 0), &body, &[]).await;
    }

    /// A frame whose checksums are right.
    pub async fn say(&mut self, mut header: Header, body: &[u8], payload: &[u8]) {
        header.payload_bytes = payload.len() as u32;
        let mut bytes = Vec::new();
        header.put_with_body(body, &mut bytes);
        bytes.extend(payload);
        self.stream.write_all(&bytes).await.unwrap();
    }

    /// The start of a write of `cells` cells, then `payload`, which may be less or more than it promises.
    pub async fn write(
        &mut self,
        transfer: u128,
        seq: u32,
        cells: &[CellDescriptor],
        promised: usize,
        payload: &[u8],
    ) {
        let mut header = Header::bare(Kind::Write, transfer, seq, 0);
        header.count = cells.len() as u16;
        header.payload_bytes = promised as u32;
        let (mut body, mut bytes) = (Vec::new(), Vec::new());
        cells.iter().for_each(|cell| cell.put(&mut body));
        header.put_with_body(&body, &mut bytes);
        bytes.extend(payload);
        self.stream.write_all(&bytes).await.unwrap();
    }

    pub async fn commit(&mut self, transfer: u128, payload: &[u8]) {
        self.say(Header::bare(Kind::Commit, transfer, 8, 0), payload, &[]).await;
    }

    pub async fn hear(&mut self) -> Header {
        let mut bytes = [0; HEADER_BYTES];
        soon(self.stream.read_exact(&mut bytes)).await.unwrap();
        Header::parse(&bytes).unwrap()
    }

    /// Waits until the receiver closes; true when it does without another reply but refusals.
    pub async fn closed(&mut self) -> bool {
        let mut rest = Vec::new();
        let _ = soon(self.stream.read_to_end(&mut rest)).await;
        rest.chunks_exact(HEADER_BYTES)
            .all(|bytes| Header::parse(bytes.try_into().unwrap()).unwrap().kind == Kind::Refused)
    }
}

/// Describes a cell with the right checksum for `bytes`.
pub fn cell(plane: u32, index: u32, bytes: &[u8]) -> CellDescriptor {
    CellDescriptor { plane, index, checksum: crc32c::crc32c(bytes) }
}
