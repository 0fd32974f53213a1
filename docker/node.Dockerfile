# intellect-node on the CPU. From the top of the checkout:
#   docker build -f docker/node.Dockerfile -t intellect-node .
# Its home, with the identity and the state, is the volume /srv/node. How to use it: docs/containers.md.
ARG DEBIAN=docker.io/library/debian:12-slim

# ---- build: word for word the same in both Dockerfiles, so that it is built once
FROM ${DEBIAN} AS build
WORKDIR /src
COPY docker/setup-debian.sh docker/
RUN docker/setup-debian.sh --build && rm -rf /var/lib/apt/lists/*
COPY . .
RUN make -j"$(nproc)" CFLAGS=-O2 LDFLAGS="-s -Wl,--as-needed" DESTDIR=/out install \
    && for p in node coordinator; do docker/runtime-packages.sh /out/usr/local/bin/intellect-$p >/out/$p.packages || exit 1; done

# ---- the image
FROM ${DEBIAN}
COPY --from=build /out/node.packages /usr/local/share/intellect/packages
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ca-certificates \
        $(cat /usr/local/share/intellect/packages) >/dev/null \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
RUN useradd --uid 7171 --home-dir /srv/node --no-create-home --shell /usr/sbin/nologin intellect \
    && install -d -m 700 -o intellect -g intellect /srv/node
COPY --from=build /out/usr/local/bin/intellect-node /usr/local/bin/

# A waiting thread that spins would take its core from the other containers.
ENV INTELLECT_HOME=/srv/node OMP_WAIT_POLICY=passive
USER intellect
WORKDIR /srv/node
VOLUME /srv/node
EXPOSE 7173
STOPSIGNAL SIGTERM
# Healthy: a member of a run. Whether it keeps up is the coordinator's to judge: intellect-coordinator status.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD grep -qs '"member": [1-9]' /srv/node/run.json
ENTRYPOINT ["intellect-node"]
CMD ["run", "--listen", "7173"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="intellect-node" \
      org.opencontainers.image.description="A node of an intellect run: trains on this machine, averages with the others" \
      org.opencontainers.image.revision="${REVISION}"
