# Inspects with an exported model, without PyTorch. From the root of a clone:
#   docker build -f samples/docker/edge.Dockerfile -t anomalib-ot-edge .
#   docker run --rm --user "$(id -u):$(id -g)" -p 127.0.0.1:8765:8765 \
#       -v "$PWD/exported/weights/openvino:/model:ro" -v "$PWD/camera_folder:/images:ro" -v "$PWD/results:/results" \
#       anomalib-ot-edge
# Other words of `anomalib-ot inspect` take the place of those in CMD; without --page add --no-healthcheck to `docker run`.
FROM python:3.12-slim AS build
WORKDIR /package
COPY pyproject.toml README.md LICENSE ./
COPY startup startup
COPY src src
RUN pip wheel --no-cache-dir --no-deps -w /wheels .

FROM python:3.12-slim
ENV PYTHONUNBUFFERED=1
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt "openvino>=2024.6" "numpy>=1.26" "pillow>=10.1" "paho-mqtt>=2.1" \
    && pip install --no-cache-dir --no-deps /wheels/*.whl \
    && rm /tmp/constraints.txt \
    && mkdir /results \
    && useradd --uid 1000 --no-create-home inspector \
    && chown inspector /results
USER 1000
WORKDIR /results
RUN anomalib-ot doctor
EXPOSE 8765
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8765/state', timeout=8)"]
ENTRYPOINT ["anomalib-ot", "inspect"]
CMD ["/model", "/images", "--watch", "--output", "/results/results.jsonl", "--resume", "--page", "--host", "0.0.0.0"]
