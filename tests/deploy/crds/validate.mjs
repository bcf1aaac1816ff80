// Validates resources, a JSON list on standard input, with the classes of @kubernetes-models that are in the folder
// argv[2]. Prints a JSON list of [kind/name, problem]. A kind without a class is a problem.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const PACKAGES = {
  "cert-manager.io": "cert-manager",
  "gateway.networking.k8s.io": "gateway-api",
  "keda.sh": "keda",
  "monitoring.coreos.com": "prometheus-operator",
};
const problems = [];
for (const resource of JSON.parse(readFileSync(0, "utf8"))) {
  const label = `${resource.kind}/${resource.metadata.name}`;
  try {
    const [group] = resource.apiVersion.split("/");
    const path = `${process.argv[2]}/@kubernetes-models/${PACKAGES[group]}/${resource.apiVersion}/${resource.kind}.js`;
    const found = await import(pathToFileURL(path).href);
    new found[resource.kind](resource).validate();
  } catch (error) {
    problems.push([label, String(error.message)]);
  }
}
console.log(JSON.stringify(problems));
