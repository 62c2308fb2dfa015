#!/bin/sh
# Says in one line, before anything slow starts, that the Fashion-MNIST files of make demo-images are missing.
# Arguments: those of the demo; with data.path=DIR among them the files are looked for there, by the demo itself.
set -u
folder=/usr/share/datasets/fashion-mnist

case " $* " in *data.path=*) exit 0 ;; esac
for file in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
    if [ ! -f "$folder/$file-ubyte.gz" ] && [ ! -f "$folder/$file-ubyte" ]; then
        echo "error: the Fashion-MNIST files are not in $folder; fix: apt-get install dataset-fashion-mnist," \
            "or name their folder: make demo-images DEMO=\"--set data.path=DIR\"" >&2
        exit 1
    fi
done
