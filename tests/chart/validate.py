"""Holds manifests against the schemas of several versions of Kubernetes, where an unknown field is a fault too.

usage: validate CRDS VERSION[,VERSION…] FILE...

CRDS is a directory of CustomResourceDefinitions, for kinds that are not Kubernetes' own. Prints a line for each
fault, and at last how many objects were held against how many versions.
"""
import json
import pathlib
import re
import sys

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

SCHEMAS = pathlib.Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"


def strict(schema):
    """An object whose properties are named has no others."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema.pop("anyOf", None)
        schema["type"] = ["integer", "string"]
    if schema.pop("nullable", False) and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    return schema


def definitions(directory):
    """Validators of the kinds that CustomResourceDefinitions define."""
    found = {}
    for path in sorted(pathlib.Path(directory).glob("*.yaml")):
        for crd in filter(None, yaml.safe_load_all(path.read_text())):
            spec = crd["spec"]
            for version in filter(lambda v: v["served"], spec["versions"]):
                schema = strict(version["schema"]["openAPIV3Schema"])
                # A definition leaves the metadata to Kubernetes.
                schema["properties"]["metadata"] = {"type": "object"}
                key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                found[key] = Draft202012Validator(schema)
    return found


class Version:
    """The schemas of one version of Kubernetes."""

    def __init__(self, version):
        matches = sorted(SCHEMAS.glob(f"v{version}.*-strict"))
        if not matches:
            sys.exit(f"there are no schemas of Kubernetes {version}")
        self.directory = matches[-1]
        shared = json.loads((self.directory / "_definitions.json").read_text())
        self.registry = Resource.from_contents(shared, default_specification=DRAFT202012) @ Registry()
        self.registry = self.registry.with_resource("_definitions.json", DRAFT202012.create_resource(shared))
        self.validators = {}

    def validator(self, api, kind):
        name = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api)
        path = self.directory / f"{kind.lower()}-{name}.json"
        if path not in self.validators:
            schema = json.loads(path.read_text()) if path.exists() else None
            registry = self.registry
            self.validators[path] = schema and Draft202012Validator(schema, registry=registry)
        return self.validators[path]


def main(crds, versions, *files):
    faults = held = 0
    custom = definitions(crds)
    versions = [(version, Version(version)) for version in versions.split(",")]
    for file in files:
        for item in filter(None, yaml.safe_load_all(pathlib.Path(file).read_text())):
            held += 1
            api, kind = item["apiVersion"], item["kind"]
            for version, schemas in versions:
                validator = custom.get((api, kind)) or schemas.validator(api, kind)
                told = f"{file}: {kind} {item['metadata'].get('name')}, Kubernetes {version}"
                if validator is None:
                    print(f"{told}: there is no {kind} in {api}")
                    faults += 1
                    continue
                for error in validator.iter_errors(item):
                    print(f"{told}: {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}")
                    faults += 1
    print(f"{held} objects, {len(versions)} versions, {faults} faults")
    return faults != 0


if len(sys.argv) < 4:
    sys.exit(__doc__)
sys.exit(main(*sys.argv[1:]))
