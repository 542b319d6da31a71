#!/usr/bin/env python
"""Serve a classifier, detector or segmentor over HTTP: python tools/serve.py MODEL --weights FILE

    curl -F request=@photo.jpg http://127.0.0.1:8000/predict

A LitServe server (https://lightning.ai/docs/litserve): requests that arrive together become one
batch, and /health says whether the model is loaded.
"""

import argparse
import io
import signal
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    from fastapi import UploadFile
    from fastapi.responses import JSONResponse
    from litserve import LitAPI, LitServer
except ImportError:
    # Enough for --help.
    LitAPI, LitServer, UploadFile, JSONResponse = object, None, None, None

MAX_PIXELS = 64_000_000


def decode(upload: bytes) -> np.ndarray:
    """The pixels of an uploaded image file, upright, BGR uint8 (height, width, 3).

    Raises:
        ValueError: The upload is empty, is no image, is damaged or too large.
    """
    if not upload:
        raise ValueError('the upload is empty')
    try:
        with Image.open(io.BytesIO(upload)) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                pixels = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
                return np.ascontiguousarray(pixels[..., ::-1])
    except UnidentifiedImageError as error:
        raise ValueError('the upload is no image of a known format') from error
    except Exception as error:
        # Whatever a decoder says of a strange file, it is the sender's.
        raise ValueError(f'the upload cannot be read as an image: {error}') from error
    raise ValueError(f'the image is {width} x {height} pixels, more than {MAX_PIXELS:,} in all')


class Service(LitAPI):
    """Images in, predictions as JSON out.

    Args:
        model: A name of the model zoo, or the path of a config.
        weights: Path of a checkpoint, or True for the authors' weights.
        threads: Threads of the model on a CPU; 0 leaves it to torch.
        **options: Arguments of LitAPI.
    """

    def __init__(self, model: str, weights: str | bool, threads: int = 0, **options: object):
        super().__init__(**options)
        self.model, self.weights, self.threads = model, weights, threads

    def setup(self, device: str) -> None:
        """Load the model, in the process that will run it."""
        import torch

        from mmvim.apis import load_config
        from mmvim.apis.inferencers import make_inferencer

        if self.threads:
            torch.set_num_threads(self.threads)
        self.inferencer = make_inferencer(load_config(self.model), self.weights, device)

    # An exception here or below would be the answer to the whole batch: errors are results.

    def decode_request(self, request: UploadFile) -> np.ndarray | ValueError:
        """The image of a request, or why there is none."""
        try:
            return decode(request.file.read())
        except ValueError as error:
            return error

    def batch(self, inputs: list) -> list:
        """Leave images as they are: they may differ in size."""
        return inputs

    def predict(self, x: list) -> list:
        """The prediction of each image, or its error."""
        images = [item for item in x if isinstance(item, np.ndarray)]
        found = iter(self.inferencer.predict(images, len(images)) if images else ())
        return [next(found).prediction if isinstance(item, np.ndarray) else item for item in x]

    def unbatch(self, output: list) -> list:
        """One result a request."""
        return output

    def encode_response(self, output: dict | ValueError) -> JSONResponse:
        """The answer: 200 with the prediction, or 400 with the error."""
        if isinstance(output, ValueError):
            return JSONResponse({'error': str(output)}, 400)
        output.pop('image', None)
        return JSONResponse(output)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition(':')[0])
    parser.add_argument('model', help='path of a config, or a name of the model zoo')
    parser.add_argument('--weights', required=True, help="checkpoint, or 'zoo' for the authors'")
    parser.add_argument('--host', default='127.0.0.1')
    parser.add_argument('--port', type=int, default=8000)
    parser.add_argument('--device', default='auto', choices=('auto', 'cpu', 'cuda'))
    parser.add_argument('--batch-size', type=int, default=8, help='most images at a time')
    parser.add_argument(
        '--batch-timeout', type=float, default=0.01, help='seconds to wait for more images'
    )
    parser.add_argument('--timeout', type=float, default=30, help='seconds until a request fails')
    parser.add_argument('--workers', type=int, default=1, help='processes, each with the model')
    parser.add_argument('--threads', type=int, default=0, help='threads of each on a CPU')
    parser.add_argument('--max-upload', type=int, default=16, help='MiB of the largest request')
    return parser.parse_args()


def main() -> None:
    """Run the server until it is interrupted."""
    args = parse_args()
    if LitServer is None:
        raise SystemExit("the server needs LitServe: pip install 'mmvim[serve]'")
    service = Service(
        args.model,
        True if args.weights == 'zoo' else args.weights,
        args.threads,
        max_batch_size=args.batch_size,
        batch_timeout=args.batch_timeout,
    )
    server = LitServer(
        service,
        accelerator=args.device,
        workers_per_device=args.workers,
        timeout=args.timeout,
        max_payload_size=args.max_upload * 2**20,
    )
    # LitServe ends its processes after Ctrl+C only.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server.run(host=args.host, port=args.port, generate_client_file=False)


if __name__ == '__main__':
    main()
