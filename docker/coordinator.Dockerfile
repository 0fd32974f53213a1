# intellect-coordinator, with the intellect-node that it starts beside itself to aggregate. From the top of the checkout:
#   docker build -f docker/coordinator.Dockerfile -t intellect-coordinator .
# The run's folder, with its keys and its store, is the volume /srv/run. How to use it: docs/containers.md.
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
COPY --from=build /out/*.packages /usr/local/share/intellect/
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ca-certificates \
        $(cat /usr/local/share/intellect/*.packages) >/dev/null \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*
RUN useradd --uid 7171 --home-dir /srv/run --no-create-home --shell /usr/sbin/nologin intellect \
    && install -d -m 700 -o intellect -g intellect /srv/run
COPY --from=build /out/usr/local/bin/ /usr/local/bin/

ENV OMP_WAIT_POLICY=passive
USER intellect
WORKDIR /srv/run
VOLUME /srv/run
EXPOSE 7171 7172
STOPSIGNAL SIGTERM
# Without a serving process, status tells what the store remembers and succeeds: ask whether it serves.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s \
    CMD intellect-coordinator status /srv/run --json | grep -q '"serving": true'
ENTRYPOINT ["intellect-coordinator"]
CMD ["serve", "/srv/run", "--listen", "0.0.0.0:7171"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="intellect-coordinator" \
      org.opencontainers.image.description="The coordinator of an intellect run, and a node that aggregates for it" \
      org.opencontainers.image.revision="${REVISION}"
