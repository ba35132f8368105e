# One image for every process of Parallama; compose.yaml says which one a container runs.
# The Python is the one that requirements.txt was locked with.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python3 -m venv /pip && python3 -m venv --without-pip /opt/parallama
# All but the bundled model: wheels alone, each by its hash.
COPY requirements.txt requirements-dev.txt ./
RUN awk '/^[a-z]/ { wanted = !/^xllamacpp==/ } wanted' requirements.txt > /tmp/run.txt \
 && awk '/^[a-z]/ { wanted = /^(hatchling|packaging|pathspec|pluggy|tomlkit|trove-classifiers)==/ } wanted' \
      requirements-dev.txt > /tmp/build.txt \
 && /pip/bin/pip --python /opt/parallama/bin/python install --quiet \
      --require-hashes --only-binary :all: -r /tmp/run.txt \
 && /pip/bin/pip install --quiet --require-hashes --only-binary :all: -r /tmp/build.txt
COPY pyproject.toml README.md LICENSE config.example.yaml ./
COPY envoy envoy
COPY authz authz
COPY ratelimit ratelimit
COPY usage_sink usage_sink
COPY parallama parallama
RUN /pip/bin/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir /tmp/wheel . \
 && /pip/bin/pip --python /opt/parallama/bin/python install --quiet --no-index --no-deps /tmp/wheel/*.whl \
# Another package that brings one of our names would be mixed with ours.
 && /opt/parallama/bin/python -P -c "from importlib.metadata import packages_distributions as found; \
names = ('authz', 'ratelimit', 'usage_sink', 'parallama'); \
assert all(found()[name] == ['parallama'] for name in names), found()"

FROM ${BASE}
LABEL org.opencontainers.image.title="Parallama" \
      org.opencontainers.image.description="Keys, quotas and honest usage for a shared language-model server" \
      org.opencontainers.image.licenses="MIT"
# Fixed numbers: volumes and secrets belong to them.
RUN groupadd --gid 10001 parallama \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/parallama \
      --shell /usr/sbin/nologin parallama \
 && install -d -o 10001 -g 10001 -m 0700 /var/lib/parallama \
 && install -d -o 10001 -g 10001 -m 0700 /run/signing \
 && install -d -o 10001 -g 10001 -m 0750 /run/secrets \
 && install -d /etc/parallama
COPY --from=build /opt/parallama /opt/parallama
ENV PATH=/opt/parallama/bin:${PATH} \
    PARALLAMA_CONFIG=/etc/parallama/config.yaml \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MALLOC_ARENA_MAX=1
WORKDIR /var/lib/parallama
USER 10001:10001
CMD ["parallama", "--help"]
