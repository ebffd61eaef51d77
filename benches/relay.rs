//! How fast the relay's two readers are: heads found and parsed, chunk framing followed.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dindpool::proxy::relay::head::Scanner;
use dindpool::proxy::relay::{Body, Framing, RequestHead, ResponseHead};

fn heads(c: &mut Criterion) {
    let small = b"GET /v1.51/containers/6f1d3c5b7a99/json HTTP/1.1\r\nHost: 127.0.0.1:2375\r\n\
        User-Agent: Docker-Client/28.5.2 (linux)\r\nAccept-Encoding: gzip\r\n\r\n"
        .to_vec();
    let mut large = b"POST /v1.51/build?buildargs=".to_vec();
    large.resize(100 * 1024, b'x');
    large.extend_from_slice(b" HTTP/1.1\r\nHost: docker\r\nTransfer-Encoding: chunked\r\n\r\n");
    let mut group = c.benchmark_group("request head");
    for (name, raw) in [("inspect", &small), ("build with 100 KiB of arguments", &large)] {
        group.throughput(Throughput::Bytes(raw.len() as u64));
        group.bench_function(BenchmarkId::new("scan and parse", name), |b| {
            b.iter(|| {
                let found = Scanner::default().scan(black_box(raw));
                assert!(matches!(found, Ok(Some(_))));
                RequestHead::parse(raw.clone())
            });
        });
    }
    group.finish();
    let response = b"HTTP/1.1 200 OK\r\nApi-Version: 1.51\r\nContent-Type: application/json\r\n\
        Docker-Experimental: false\r\nOstype: linux\r\nServer: Docker/28.5.2 (linux)\r\n\
        Date: Mon, 24 Nov 2025 07:00:00 GMT\r\nContent-Length: 512\r\n\r\n";
    let mut group = c.benchmark_group("response head");
    group.throughput(Throughput::Bytes(response.len() as u64));
    group.bench_function("scan and parse", |b| {
        b.iter(|| {
            let found = Scanner::default().scan(black_box(response));
            assert!(matches!(found, Ok(Some(_))));
            ResponseHead::parse(response, false).is_ok()
        });
    });
    group.finish();
}

/// A chunked body in reads of 128 KiB, as the relay gets it.
fn framing(c: &mut Criterion) {
    let mut group = c.benchmark_group("chunked body");
    for chunk in [64, 4096, 32 * 1024] {
        let one = [format!("{chunk:x}\r\n").as_bytes(), &vec![b'x'; chunk], b"\r\n"].concat();
        let stream = one.repeat((4 << 20) / chunk);
        group.throughput(Throughput::Bytes(stream.len() as u64));
        group.bench_function(BenchmarkId::new("chunks of", chunk), |b| {
            b.iter(|| {
                let mut body = Body::new(Framing::Chunked);
                let mut payload = 0;
                for read in stream.chunks(128 * 1024) {
                    let used = body.feed(black_box(read), |p| payload += p.len());
                    assert!(used.is_ok_and(|n| n == read.len()));
                }
                payload
            });
        });
    }
    group.finish();
}

criterion_group!(benches, heads, framing);
criterion_main!(benches);
