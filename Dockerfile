# For those who build with docker or podman; `make image` needs neither. The binary is
# static, and the final stage holds it and the certificate authorities alone.
#
#   docker buildx build --platform linux/amd64,linux/arm64 --build-arg VERSION=0.1.0 -t larder .
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=dev
ARG TARGETOS=linux
ARG TARGETARCH
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /larder ./cmd/larder

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /larder /usr/bin/larder
# The DaemonSet runs as root, because the node's files that it manages are root's.
# Nothing else needs to.
USER 65532:65532
ENTRYPOINT ["/usr/bin/larder"]
CMD ["agent"]
