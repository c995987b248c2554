"""Writes the artifacts that do not exist yet; run with the oldest supported JAX."""

import pickle
import shutil
import tempfile

import jax
import orbax.checkpoint

import jaxfp8
from tests.artifacts import DIRECTORY, programs
from tests.emulated_platform import emulated_platform


def export(f, arguments):
    checks = jaxfp8.export.disabled_checks()
    return jax.export.export(jax.jit(f), disabled_checks=checks)(*arguments).serialize()


def main():
    def write(name, content):
        path = DIRECTORY / name
        if path.exists():
            print(f"{path} is kept")
        else:
            data = content()
            path.write_bytes(data)
            print(f"{path}: {len(data)} bytes")

    write("train_portable_v1.jaxexport", lambda: export(programs.train, programs.train_arguments()))
    with emulated_platform():  # the custom calls, for the CPU platform
        write(
            "train_calls_v1.jaxexport", lambda: export(programs.train, programs.train_arguments())
        )
        write(
            "every_target_v1.jaxexport",
            lambda: export(programs.every_target, programs.every_target_arguments()),
        )
    write("quantized_array_v1.pickle", lambda: pickle.dumps(programs.quantized_array(), protocol=4))

    def checkpoint():
        with tempfile.TemporaryDirectory() as directory:
            with orbax.checkpoint.StandardCheckpointer() as checkpointer:
                checkpointer.save(f"{directory}/saved", programs.quantized_array())
            archive = shutil.make_archive(f"{directory}/archive", "zip", f"{directory}/saved")
            with open(archive, "rb") as file:
                return file.read()

    write("quantized_array_orbax_v1.zip", checkpoint)


if __name__ == "__main__":
    main()
