"""Sander, Ablin, Peyré 2022: do residual networks discretise neural ODEs?"""
