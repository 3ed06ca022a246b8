#!/usr/bin/env bash
# Writes the addresses of all Services where the name server of node.sh reads them, once a second.
set -u
home=$1
export KUBECONFIG="$home/kubeconfig"
template='{{range .items}}{{if ne .spec.clusterIP "None"}}{{.spec.clusterIP}} {{.metadata.name}}.{{.metadata.namespace}}.svc.cluster.local{{"\n"}}{{end}}{{end}}'
# A headless Service is its pods' addresses.
headless='{{range .items}}{{$of := .metadata}}{{range .subsets}}{{range .addresses}}{{.ip}} {{$of.name}}.{{$of.namespace}}.svc.cluster.local{{"\n"}}{{end}}{{end}}{{end}}'
while sleep 1; do
  now=$(kubectl get services -A -o go-template="$template" 2>/dev/null) || continue
  now+=$(echo; kubectl get endpoints -A -l service.kubernetes.io/headless -o go-template="$headless" 2>/dev/null)
  [ "$now" = "$(cat "$home/hosts/services" 2>/dev/null)" ] && continue
  echo "$now" > "$home/hosts/.new" && mv "$home/hosts/.new" "$home/hosts/services"
done
