#!/bin/sh
# Makes the certificates of a test cluster and a kubeconfig for each of its clients.
#
#   certificates.sh DIR SERVER    SERVER: the API server's address, https://HOST:PORT
#
# In DIR: ca, server (the API server's), tokens (the key pair of ServiceAccount tokens), and for each
# client NAME: NAME.crt, NAME.key, NAME.kubeconfig.
set -eu
dir=$1 server=$2
host=${server#https://}
host=${host%:*}
umask 077
mkdir -p "$dir"
cd "$dir"

key() { # NAME
  openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1.key"
}

key tokens
openssl pkey -in tokens.key -pubout -out tokens.pub
key ca
openssl req -x509 -new -key ca.key -days 3650 -subj /CN=ebackup-test-ca -out ca.crt

certificate() { # NAME SUBJECT EXTENSIONS
  key "$1"
  openssl req -new -key "$1.key" -subj "$2" -out "$1.csr"
  printf '%b' "$3" >extensions
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 \
    -extfile extensions -out "$1.crt" 2>/dev/null
  rm "$1.csr" extensions
}

certificate server /CN=kube-apiserver "subjectAltName=IP:127.0.0.1,IP:$host,DNS:localhost,\
DNS:kubernetes.default.svc\nextendedKeyUsage=serverAuth\n"

client() { # NAME SUBJECT
  certificate "$1" "$2" 'extendedKeyUsage=clientAuth\n'
  cat >"$1.kubeconfig" <<CONFIG
apiVersion: v1
kind: Config
clusters:
- name: test
  cluster:
    server: $server
    certificate-authority-data: $(base64 -w 0 ca.crt)
users:
- name: $1
  user:
    client-certificate-data: $(base64 -w 0 "$1.crt")
    client-key-data: $(base64 -w 0 "$1.key")
contexts:
- name: test
  context: { cluster: test, user: $1 }
current-context: test
CONFIG
}

client admin /O=system:masters/CN=admin
client controller-manager /CN=system:kube-controller-manager
client scheduler /CN=system:kube-scheduler
client node /O=system:nodes/CN=system:node:node
