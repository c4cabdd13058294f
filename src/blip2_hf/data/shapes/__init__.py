"""A generated world of coloured shapes.

`scenes.draw_scene` says what is in a picture, `drawing.render` draws it, `captions`, `questions` and `corpus` speak of
it, `grammar` checks what is said, `files.write_world` writes everything in the formats of COCO and VQAv2, and
`builder.shapes_dataset` gives it as a `datasets.Dataset`.
"""
