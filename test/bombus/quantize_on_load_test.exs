defmodule Bombus.QuantizeOnLoadTest do
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures, Safetensors, Serving}

  @moduletag :tmp_dir
  @python System.get_env("BOMBUS_PYTHON")
  @ids [1, 5, 9, 2, 77, 31, 8]

  defp copy(name, dir) do
    folder = Fixtures.copy(Fixtures.checkpoint(name), dir)
    File.rm_rf!(Path.join(folder, "adapters"))
    folder
  end

  test "a dense checkpoint is quantized, saved, and loaded as it was", %{tmp_dir: dir} do
    for name <- ["bf16-dense", "f32-dense"], device <- Fixtures.devices() do
      {:ok, dense} = Bombus.score(Bombus.load_model!(copy(name, dir), device: device), @ids)

      [four, eight] =
        for {option, bits, group_size} <- [{:int4, 4, 64}, {[bits: 8, group_size: 32], 8, 32}] do
          {:ok, model} = Bombus.load_model(copy(name, dir), quantization: option, device: device)
          assert %{bits: ^bits, group_size: ^group_size, mode: :affine} = model.quantization
          {:ok, scores} = Bombus.score(model, @ids)

          saved = Path.join(dir, "saved-#{System.unique_integer([:positive])}")
          assert :ok = Bombus.save_model(model, saved)
          {:ok, again} = Bombus.load_model(saved, quantization: option, device: device)
          assert again.quantization == model.quantization
          assert Bombus.score(again, @ids) == {:ok, scores}
          scores |> Enum.zip_with(dense, &abs(&1 - &2)) |> Enum.max()
        end

      assert 0 < eight and eight < four / 2
    end
  end

  @tag skip: if(@python == nil, do: "BOMBUS_PYTHON names no Python with mlx_lm")
  test "the numbers are those of mlx_lm.convert, which reads them back", %{tmp_dir: dir} do
    folder = Path.join(dir, "source")
    File.rename!(copy("bf16-dense", dir), folder)
    layouts = [{4, 64}, {3, 32}]

    for {bits, group_size} <- layouts do
      saved = Path.join(dir, "own-#{bits}")
      {:ok, model} = Bombus.load_model(folder, quantization: [bits: bits, group_size: group_size])
      :ok = Bombus.save_model(model, saved)
    end

    # convert wants a tokenizer, which the fixture has not.
    script = """
    import sys
    import mlx.core as mx
    from pathlib import Path
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model
    folder = Path(sys.argv[1])
    for layout in sys.argv[2:]:
      bits, group = map(int, layout.split(","))
      model, config = load_model(folder / "source")
      model, config = quantize_model(model, config, group, bits)
      target = folder / f"theirs-{bits}"
      target.mkdir()
      save_model(target, model)
      save_config(config, target / "config.json")
      theirs, _ = load_model(target)
      ours, config = load_model(folder / f"own-{bits}")
      assert config["quantization"]["bits"] == bits
      x = mx.array([[1, 5, 9, 2]])
      assert mx.array_equal(ours(x), theirs(x))
    """

    arguments = for {bits, group_size} <- layouts, do: "#{bits},#{group_size}"

    {output, status} =
      System.cmd(@python, ["-c", script, dir | arguments], stderr_to_stdout: true)

    assert status == 0, output

    for {bits, _group_size} <- layouts do
      {:ok, ours} = Safetensors.read(Path.join(dir, "own-#{bits}"))
      {:ok, theirs} = Safetensors.read(Path.join(dir, "theirs-#{bits}"))
      assert ours == theirs
    end
  end

  test "the demo model's files go along, and it speaks from the copy", %{tmp_dir: dir} do
    saved = Path.join(dir, "demo")
    :ok = Bombus.save_model(Bombus.load_model!(:demo), saved)

    serving =
      Serving.new(Bombus.load_model!(saved), Bombus.load_tokenizer!(saved), max_new_tokens: 60)

    assert %{results: [%{text: text}]} = Serving.run(serving, "Write a post about coffee")
    assert text =~ ~r/coffee/i
  end

  test "what is quantized already must agree", %{tmp_dir: dir} do
    folder = Fixtures.checkpoint("f32-tied")
    assert {:ok, _model} = Bombus.load_model(folder, quantization: :int4)
    assert {:ok, _model} = Bombus.load_model(folder, quantization: [bits: 4])

    for wrong <- [:int8, [bits: 4, group_size: 32]] do
      assert {:error, %Error{reason: :quantization_mismatch}} =
               Bombus.load_model(folder, quantization: wrong)
    end

    for wrong <- [:int7, [bits: 7], [group_size: 64], [bits: 4, groups: 64], 4] do
      assert_raise ArgumentError, ~r/:quantization/, fn ->
        Bombus.load_model(folder, quantization: wrong)
      end
    end

    assert_raise ArgumentError, ~r/a model made by/, fn -> Bombus.save_model(:demo, dir) end
    file = Path.join(dir, "file")
    File.write!(file, "")
    model = Bombus.load_model!(:demo)
    assert {:error, %Error{reason: :io}} = Bombus.save_model(model, Path.join(file, "folder"))

    assert_raise ArgumentError, ~r/path of a folder/, fn ->
      Bombus.save_model(model, {:local, dir})
    end

    # Not onto itself, by whatever name.
    own = copy("bf16-dense", dir)
    link = Path.join(dir, "link")
    File.ln_s!(own, link)
    model = Bombus.load_model!(own, quantization: :int4)
    before = File.read!(Path.join(own, "config.json"))

    for path <- [own, link] do
      assert {:error, %Error{reason: :io, message: message}} = Bombus.save_model(model, path)
      assert message =~ "another folder"
    end

    assert File.read!(Path.join(own, "config.json")) == before
    assert {:ok, _model} = Bombus.load_model(own)
  end
end
