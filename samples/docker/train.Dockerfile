# Trains, tests and exports; with the CUDA build of PyTorch that the package index offers. From the root of a clone:
#   docker build -f samples/docker/train.Dockerfile -t anomalib-ot .
#   docker run --rm --gpus all --shm-size 2g --user "$(id -u):$(id -g)" -v "$PWD:/work" anomalib-ot \
#       train --model OTPrototypes --data Folder --data.seed 0 --data.name bolts --data.root ./bolts --data.normal_dir good
# `--build-arg FAISS=gpu` takes the GPU build of FAISS. Weights of backbones are downloaded once into /work/.cache.
FROM python:3.12-slim

ARG FAISS=cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /package
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY startup startup
COPY src src
RUN pip install -c constraints.txt ".[${FAISS},openvino,tensorboard]" && anomalib-ot --version

# The user that `docker run --user` gives has no entry and no home: caches go beside the data.
ENV HOME=/work XDG_CACHE_HOME=/work/.cache HF_HOME=/work/.cache/huggingface MPLCONFIGDIR=/tmp/matplotlib
RUN useradd --uid 1000 --home-dir /work trainer && mkdir /work && chown trainer /work
USER 1000
WORKDIR /work
ENTRYPOINT ["anomalib-ot"]
CMD ["doctor"]
