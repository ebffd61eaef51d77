// dockerode through the pool. docker-modem hijacks in its own way: raw stdin goes behind the request's body, on a
// connection that it may have used before.
const Docker = require('dockerode'), assert = require('assert'), fs = require('fs'), { PassThrough } = require('stream');
const mark = process.env.MARK, url = new URL(process.env.DOCKER_HOST.replace('tcp:', 'http:'));
const docker = new Docker({ host: url.hostname, port: url.port });
const { execFileSync } = require('child_process'), path = require('path'), os = require('os');

const read = (stream) => new Promise((resolve, reject) => {
  const parts = [];
  stream.on('data', (d) => parts.push(d)).on('end', () => resolve(Buffer.concat(parts).toString())).on('error', reject);
});
const demux = async (stream) => {
  const out = new PassThrough(), err = new PassThrough();
  docker.modem.demuxStream(stream, out, err);
  stream.on('end', () => { out.end(); err.end(); });
  stream.on('close', () => { out.end(); err.end(); });
  return Promise.all([read(out), read(err)]);
};

(async () => {
  const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'dpn'));
  fs.copyFileSync(process.env.ROOTFS, path.join(dir, 'rootfs.tar'));
  fs.writeFileSync(path.join(dir, 'Dockerfile'), 'FROM scratch\nADD rootfs.tar /\nARG MARK\nRUN echo "$MARK" >/mark\nCMD ["cat", "/mark"]\n');
  fs.writeFileSync(path.join(dir, 'ctx.tar'), execFileSync('tar', ['-C', dir, '-c', 'rootfs.tar', 'Dockerfile'], { maxBuffer: 1e9 }));
  const tag = `node:${mark}`;
  const build = await docker.buildImage(path.join(dir, 'ctx.tar'), { t: tag, networkmode: 'none', buildargs: { MARK: mark } });
  const lines = await new Promise((resolve, reject) => docker.modem.followProgress(build, (e, r) => e ? reject(e) : resolve(r)));
  assert(lines.some((l) => (l.stream || '').includes('Successfully built')), JSON.stringify(lines));
  fs.rmSync(dir, { recursive: true });

  const out = new PassThrough(), collected = read(out);
  const [result, container] = await docker.run(tag, ['sh', '-c', 'cat /mark; exit 3'], out, { Tty: true, HostConfig: { NetworkMode: 'none' } });
  out.end();
  assert.strictEqual(result.StatusCode, 3);
  assert.strictEqual((await collected).trim(), mark);
  await container.remove();

  const box = await docker.createContainer({ Image: tag, Cmd: ['sleep', '600'], HostConfig: { NetworkMode: 'none' } });
  await box.start();
  for (let i = 0; i < 5; i++) {
    const exec = await box.exec({ Cmd: ['sh', '-c', `echo o${i}; echo e${i} >&2; exit ${i}`], AttachStdout: true, AttachStderr: true });
    assert.deepStrictEqual(await demux(await exec.start({})), [`o${i}\n`, `e${i}\n`]);
    assert.strictEqual((await exec.inspect()).ExitCode, i);
  }
  const cat = await box.exec({ Cmd: ['cat'], AttachStdin: true, AttachStdout: true });
  const duplex = await cat.start({ hijack: true, stdin: true });
  const echoed = demux(duplex);
  duplex.write('typed '.repeat(100000));
  duplex.end('end');
  assert.strictEqual((await echoed)[0], 'typed '.repeat(100000) + 'end');

  const reader = await docker.createContainer({ Image: tag, Cmd: ['sh', '-c', 'read x; echo got $x'], OpenStdin: true, StdinOnce: true, HostConfig: { NetworkMode: 'none' } });
  const attached = await reader.attach({ stream: true, stdin: true, stdout: true, stderr: true, hijack: true });
  const heard = demux(attached);
  await reader.start();
  attached.end('hello\n');
  assert.deepStrictEqual(await heard, ['got hello\n', '']);
  assert.strictEqual((await reader.wait()).StatusCode, 0);
  const logs = await reader.logs({ follow: true, stdout: true });
  assert.deepStrictEqual((await demux(logs))[0], 'got hello\n');
  await reader.remove();
  await box.remove({ force: true });
  await assert.rejects(docker.getContainer('no-such-thing').inspect(), (e) => e.statusCode === 404 && /No such container/.test(e.message));
  console.log('all well');
})().catch((e) => { console.error(e); process.exit(1); });
