"""docker-py through the pool: what a script in somebody's CI does. Asserts on every answer."""
import io, os, tarfile, threading
import docker

mark, registry = os.environ["MARK"], os.environ["REGISTRY"]
client = docker.from_env()
assert client.ping()

context = io.BytesIO()
with tarfile.open(fileobj=context, mode="w") as tar:
    tar.add(os.environ["ROOTFS"], "rootfs.tar")
    dockerfile = b'FROM scratch\nADD rootfs.tar /\nARG MARK\nRUN echo "$MARK" >/mark\nCMD ["cat", "/mark"]\n'
    info = tarfile.TarInfo("Dockerfile")
    info.size = len(dockerfile)
    tar.addfile(info, io.BytesIO(dockerfile))
name = f"{registry}/py-{mark}"
image, log = client.images.build(fileobj=io.BytesIO(context.getvalue()), custom_context=True, tag=name + ":1",
                                 network_mode="none", buildargs={"MARK": mark})
assert any("Successfully built" in line.get("stream", "") for line in log)
assert client.containers.run(name + ":1", remove=True, network_mode="none") == f"{mark}\n".encode()
try:
    client.containers.run(name + ":1", ["sh", "-c", "echo bad >&2; exit 3"], remove=True, network_mode="none")
    raise SystemExit("a failing container must raise")
except docker.errors.ContainerError as error:
    assert error.exit_status == 3 and b"bad" in error.stderr, error

# exec start upgrades a connection that has served other requests before. The pauses are for docker-py itself: it
# loses what comes in one segment with the 101, from a daemon without a pool too.
box = client.containers.run(name + ":1", ["sleep", "600"], detach=True, network_mode="none", name="py" + mark)
for n in range(5):
    code, out = client.containers.get("py" + mark).exec_run(["sh", "-c", f"usleep 200000; echo {n}; exit {n}"])
    assert (code, out) == (n, f"{n}\n".encode()), (code, out)
code, (out, err) = box.exec_run(["sh", "-c", "usleep 200000; echo o; echo e >&2"], demux=True)
assert (code, out, err) == (0, b"o\n", b"e\n"), (code, out, err)
# Python's SSLSocket cannot end one direction alone, so over TLS it is the reader that ends.
tls = bool(os.environ.get("DOCKER_TLS_VERIFY"))
reader = client.api.exec_create(box.id, ["head", "-n", "1"] if tls else ["cat"], stdin=True)["Id"]
sock = client.api.exec_start(reader, socket=True)
raw = sock if tls else sock._sock
raw.sendall(b"typed\n")
if not tls:
    raw.shutdown(1)
said = b"".join(iter(lambda: raw.recv(4096), b""))
assert said.endswith(b"typed\n"), said

archive = io.BytesIO()
with tarfile.open(fileobj=archive, mode="w") as tar:
    info = tarfile.TarInfo("file")
    info.size = 6
    tar.addfile(info, io.BytesIO(b"inside"))
assert box.put_archive("/", archive.getvalue())
stream, stat = box.get_archive("/file")
assert stat["size"] == 6
with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as tar:
    assert tar.extractfile("file").read() == b"inside"

seen = []
events = client.events(decode=True, filters={"container": box.id})
reader = threading.Thread(target=lambda: [seen.append(e["Action"]) or e["Action"] == "destroy" and events.close()
                                          for e in events], daemon=True)
reader.start()
stats = next(client.api.stats(box.id, decode=True))
assert stats["name"] == "/py" + mark, stats["name"]
box.kill()
assert box.wait()["StatusCode"] == 137
box.remove()

talker = client.containers.run(name + ":1", ["sh", "-c", "for i in 1 2 3; do echo $i; usleep 50000; done"],
                               detach=True, network_mode="none")
assert b"".join(talker.logs(stream=True, follow=True)) == b"1\n2\n3\n"
talker.remove(force=True)

pushed = list(client.images.push(name, tag="1", stream=True, decode=True))
assert any("digest: sha256:" in line.get("status", "") for line in pushed), pushed
data = b"".join(client.images.get(name + ":1").save())
client.images.remove(name + ":1")
assert client.images.load(data)[0].id == image.id
client.images.remove(image.id, force=True)
assert client.images.pull(name, tag="1").tags == [name + ":1"]

network, volume = client.networks.create("py" + mark), client.volumes.create("py" + mark)
assert network.id in [n.id for n in client.networks.list(names=["py" + mark])]
assert client.containers.run(name + ":1", ["sh", "-c", "echo v >/v/f; cat /v/f"], remove=True, network="py" + mark,
                             volumes={"py" + mark: {"bind": "/v"}}) == b"v\n"
network.remove()
volume.remove()
try:
    client.containers.get("no-such-thing")
    raise SystemExit("a missing container must raise")
except docker.errors.NotFound as error:
    assert "No such container" in error.explanation
print("all well")
