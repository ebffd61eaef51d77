//! `docker build` in all its forms, and the way of its result into a registry.

use super::Lab;
use super::common::client::Flavour;
use super::common::unique;

/// An image that prints its mark.
pub const APP: &str =
    "FROM scratch\nADD rootfs.tar /\nARG MARK\nRUN echo \"$MARK\" >/mark\nCMD [\"cat\", \"/mark\"]\n";

/// Which builders a rule is about.
#[derive(Clone, Copy)]
enum For {
    Every,
    Buildx,
    Classic,
}

/// One rule.
pub struct Scenario {
    builders: For,
    run: fn(&Lab, Flavour),
}

impl Scenario {
    /// Whether this client can show it.
    pub fn fits(&self, flavour: Flavour) -> bool {
        match self.builders {
            For::Every => true,
            For::Buildx => flavour.has_buildx(),
            For::Classic => !flavour.is_buildkit(),
        }
    }

    /// Runs it.
    pub fn run(&self, lab: &Lab, flavour: Flavour) {
        (self.run)(lab, flavour);
    }
}

const fn every(run: fn(&Lab, Flavour)) -> Scenario {
    Scenario { builders: For::Every, run }
}

const fn buildx(run: fn(&Lab, Flavour)) -> Scenario {
    Scenario { builders: For::Buildx, run }
}

const fn classic(run: fn(&Lab, Flavour)) -> Scenario {
    Scenario { builders: For::Classic, run }
}

/// All rules about building.
pub const RULES: &[(&str, Scenario)] = &[
    ("a build from a directory runs where it was built", every(from_directory)),
    ("a build from a Dockerfile on stdin pulls its base and runs", every(dockerfile_on_stdin)),
    ("a build from a tar on stdin runs", every(tar_on_stdin)),
    ("100 KiB of build args arrive whole", every(long_build_args)),
    ("a context of 8 MiB arrives whole", every(large_context)),
    ("a failing RUN makes the client fail with its exit code in the message", every(failing_run)),
    ("a build, then a push, then a pull give the same image", every(push_and_pull)),
    ("build --push reaches the registry", buildx(build_push)),
    ("a build exports files to the client", buildx(export_local)),
    ("a secret of the client reaches RUN", buildx(secret)),
    ("an intermediate image of a classic build can be run", classic(intermediate)),
];

fn from_directory(lab: &Lab, flavour: Flavour) {
    let (t, mark) = (lab.terminal(flavour), unique());
    t.context("ctx", APP);
    let out = t.run(&format!("docker build --network none --build-arg MARK={mark} -t dir:{mark} ctx"));
    assert_eq!(out.code, 0, "{}", out.all());
    assert!(out.all().contains("RUN echo"), "the build's progress is shown: {}", out.all());
    assert_eq!(t.ok(&format!("docker run --rm --network none dir:{mark}")), format!("{mark}\n"));
}

fn dockerfile_on_stdin(lab: &Lab, flavour: Flavour) {
    let (t, mark) = (lab.terminal(flavour), unique());
    t.write("Dockerfile", format!("FROM {}\nRUN echo stdin-{mark} >/mark\n", lab.registry.busybox()));
    t.ok(&format!("docker build --network none -t stdin:{mark} - <Dockerfile"));
    assert_eq!(
        t.ok(&format!("docker run --rm --network none stdin:{mark} cat /mark")),
        format!("stdin-{mark}\n")
    );
}

fn tar_on_stdin(lab: &Lab, flavour: Flavour) {
    let (t, mark) = (lab.terminal(flavour), unique());
    t.context("ctx", APP);
    t.ok(&format!("tar -C ctx -c . | docker build --network none --build-arg MARK={mark} -t tar:{mark} -"));
    assert_eq!(t.ok(&format!("docker run --rm --network none tar:{mark}")), format!("{mark}\n"));
}

/// Classic builds carry them in the query of the request line, which is then longer than 100 KiB.
fn long_build_args(lab: &Lab, flavour: Flavour) {
    let (t, mark) = (lab.terminal(flavour), unique());
    let names: Vec<String> = (0..100).map(|i| format!("A{i}")).collect();
    let all = names.iter().map(|n| format!("${n}")).collect::<String>();
    let args = names.join(" ");
    t.context(
        "ctx",
        &format!("FROM scratch\nADD rootfs.tar /\nARG {args}\nRUN echo -n \"{all}\" | md5sum >/sum\n"),
    );
    let script = format!(
        "args=(); all=; for i in $(seq 0 99); do v=$(printf '%01024d' $i); all+=$v; \
         args+=(--build-arg A$i=$v); done\n\
         docker build --network none \"${{args[@]}}\" -t args:{mark} ctx >&2 || exit\n\
         echo -n \"$all\" | md5sum\n\
         docker run --rm --network none args:{mark} cat /sum\n"
    );
    let out = t.ok(&script);
    let sums: Vec<&str> = out.lines().collect();
    assert_eq!(sums.len(), 2, "{out}");
    assert_eq!(sums[0], sums[1], "the build args of RUN are not those of the command line");
}

fn large_context(lab: &Lab, flavour: Flavour) {
    let (t, mark) = (lab.terminal(flavour), unique());
    t.context("ctx", "FROM scratch\nADD rootfs.tar /\nCOPY blob /\nCMD [\"sha256sum\", \"/blob\"]\n");
    let out = t.ok(&format!(
        "head -c 8M /dev/urandom >ctx/blob; sha256sum <ctx/blob | cut -c-64\n\
         docker build -q --network none -t large:{mark} ctx >&2 || exit\n\
         docker run --rm --network none large:{mark} | cut -c-64"
    ));
    let sums: Vec<&str> = out.lines().collect();
    assert_eq!(sums.len(), 2, "{out}");
    assert_eq!(sums[0], sums[1], "the blob in the image is not the one in the context");
}

fn failing_run(lab: &Lab, flavour: Flavour) {
    let t = lab.terminal(flavour);
    t.context("ctx", "FROM scratch\nADD rootfs.tar /\nRUN echo so-far; exit 3\n");
    let out = t.fails("docker build --no-cache --network none ctx").all();
    assert!(out.contains("so-far"), "the failed step's output is shown: {out}");
    let told = ["returned a non-zero code: 3", "exit code: 3"];
    assert!(told.iter().any(|m| out.contains(m)), "the failed step's exit code is told: {out}");
}

fn push_and_pull(lab: &Lab, flavour: Flavour) {
    let (t, mark) = (lab.terminal(flavour), unique());
    let repository = format!("pushed-{mark}");
    let image = format!("{}/{repository}:1", lab.registry.name);
    t.context("ctx", APP);
    t.ok(&format!("docker build --network none --build-arg MARK={mark} -t {image} ctx"));
    let pushed = t.ok(&format!("docker push {image}"));
    assert!(pushed.contains("digest: sha256:"), "{pushed}");
    assert_eq!(lab.registry.tags(&repository), ["1"]);
    t.ok(&format!("docker rmi {image}"));
    t.fails(&format!("docker inspect {image}"));
    t.ok(&format!("docker pull {image}"));
    assert_eq!(t.ok(&format!("docker run --rm --network none {image}")), format!("{mark}\n"));
}

fn build_push(lab: &Lab, flavour: Flavour) {
    let (t, mark) = (lab.terminal(flavour), unique());
    let repository = format!("direct-{mark}");
    let image = format!("{}/{repository}:1", lab.registry.name);
    t.context("ctx", APP);
    t.ok(&format!("docker build --push --network none --build-arg MARK={mark} -t {image} ctx"));
    assert_eq!(lab.registry.tags(&repository), ["1"]);
    // Whoever comes later, wherever they are, gets it from the registry.
    let other = lab.terminal(flavour);
    assert_eq!(other.ok(&format!("docker run --rm --network none {image}")), format!("{mark}\n"));
}

fn export_local(lab: &Lab, flavour: Flavour) {
    let (t, mark) = (lab.terminal(flavour), unique());
    t.context("ctx", &format!("{APP}FROM scratch\nCOPY --from=0 /mark /bin/busybox /out/\n"));
    t.ok(&format!("docker build --network none --build-arg MARK={mark} -o dest ctx"));
    assert_eq!(t.ok("cat dest/out/mark"), format!("{mark}\n"));
    t.ok(
        "mkdir root && tar -C root -xf ctx/rootfs.tar ./bin/busybox && cmp root/bin/busybox dest/out/busybox",
    );
}

fn secret(lab: &Lab, flavour: Flavour) {
    let (t, mark) = (lab.terminal(flavour), unique());
    t.context(
        "ctx",
        "FROM scratch\nADD rootfs.tar /\nRUN --mount=type=secret,id=key md5sum </run/secrets/key >/sum\n\
         CMD [\"cat\", \"/sum\"]\n",
    );
    t.write("key", &mark);
    t.ok(&format!("docker build --no-cache --network none --secret id=key,src=key -t secret:{mark} ctx"));
    let sum = t.ok("md5sum <key");
    assert_eq!(t.ok(&format!("docker run --rm --network none secret:{mark}")), sum);
}

fn intermediate(lab: &Lab, flavour: Flavour) {
    let (t, mark) = (lab.terminal(flavour), unique());
    t.context("ctx", &format!("FROM scratch\nADD rootfs.tar /\nRUN echo {mark} >/one\nRUN echo two >/two\n"));
    let out = t.ok(&format!("docker build --rm=false --network none -t steps:{mark} ctx"));
    let images: Vec<&str> = out.lines().filter_map(|l| l.strip_prefix(" ---> ")).collect();
    let before = images.iter().filter(|i| i.len() == 12).rev().nth(1);
    let before = before.unwrap_or_else(|| panic!("no ids of steps in {out}"));
    let seen =
        t.ok(&format!("docker run --rm --network none {before} sh -c 'cat /one; ls /two 2>&1 || true'"));
    assert!(seen.starts_with(&format!("{mark}\n")), "{seen}");
    assert!(seen.contains("No such file"), "the step before the last has no /two: {seen}");
}
