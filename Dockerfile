# A GPU machine: docker build -t safervlm . && docker run --gpus all -v "$PWD:/work" safervlm predict --config configs/measure.yaml
# Results and caches are written below /work, which must be writable for the user with id 1000 (or: --user "$(id -u)").
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/safervlm
COPY pyproject.toml README.md LICENSE ./
COPY safervlm safervlm
COPY callbacks callbacks
COPY configs configs
# The exact versions that the tests ran with, where a constraints file has them.
COPY scripts scripts
RUN python3 -m venv /opt/venv \
    && if [ -f scripts/constraints.txt ]; then sed '/^torch[=<>]/d' scripts/constraints.txt > /tmp/constraints.txt; else : > /tmp/constraints.txt; fi \
    && /opt/venv/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt ".[api,remote]" \
    && rm /tmp/constraints.txt

# Caches of models and datasets are in the mounted folder, below .cache.
ENV PATH=/opt/venv/bin:$PATH HOME=/work
WORKDIR /work
RUN chown 1000 /work
# Ubuntu's image has a user with this id.
USER 1000
ENTRYPOINT ["safervlm"]
CMD ["--help"]
