# For machines with NVIDIA GPUs: the toolkit that CUDA C++ is built with, torch for the same CUDA, and all that tests and
# benches compare with. `docker build -t vitkernels .`, then `docker run --gpus all vitkernels` tests and times.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace/vitkernels
COPY . .
# no GPU is seen while an image is built: what to compile for is said here
ARG TORCH_CUDA_ARCH_LIST="7.5;8.0;8.6;8.9;9.0+PTX"
ENV TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST}
RUN make install PYTHON=python3
ENV PATH="/workspace/vitkernels/.venv/bin:${PATH}"
CMD ["make", "gpu"]
