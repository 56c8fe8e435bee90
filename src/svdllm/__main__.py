"""``python -m svdllm``, which torchrun and accelerate launch can start too."""

from svdllm.cli import main

if __name__ == "__main__":
    main()
