defmodule Bombus.PackedTest do
  # AWQ and GPTQ in 4 bits, whose tensors become those that mlx-lm makes of them.
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures, Safetensors, Tensor}

  @moduletag :tmp_dir
  @root Path.expand("../fixtures/packed", __DIR__)
  @tensors "model.safetensors"
  @q "model.layers.0.self_attn.q_proj"

  defp copy(name, dir), do: Fixtures.copy(Path.join(@root, name), dir)

  defp described(%Tensor{type: type, shape: shape, binary: binary}) do
    hash = :crypto.hash(:sha256, binary) |> Base.encode16(case: :lower)
    %{"dtype" => Safetensors.dtype(type), "shape" => Tuple.to_list(shape), "sha256" => hash}
  end

  defp reversed(words) do
    for(<<word::binary-4 <- words>>, do: word) |> Enum.reverse() |> IO.iodata_to_binary()
  end

  for name <- ~w(awq awq-symmetric gptq-as-awq gptq gptq-v2) do
    test "#{name} has mlx-lm's numbers, bit by bit", %{tmp_dir: dir} do
      folder = copy(unquote(name), dir)
      {:ok, model} = Bombus.load_model(folder, quantization: :int4)
      group_size = Fixtures.read_json(Path.join(folder, "config.json"))["quantization_config"]
      assert %{bits: 4, mode: :affine} = model.quantization
      assert model.quantization.group_size == group_size["group_size"]
      {:ok, scores} = Bombus.score(model, [1, 5, 9, 2, 40, 31, 8])

      saved = Path.join(dir, "saved")
      assert :ok = Bombus.save_model(model, saved)
      {:ok, tensors} = Safetensors.read(saved)
      expected = Fixtures.read_json(Path.join(folder, "expected.json"))
      assert Map.new(tensors, fn {name, tensor} -> {name, described(tensor)} end) == expected

      {:ok, again} = Bombus.load_model(saved)
      assert again.quantization == model.quantization
      assert Bombus.score(again, [1, 5, 9, 2, 40, 31, 8]) == {:ok, scores}
    end
  end

  # AutoGPTQ writes biases for layers that have none (Qwen2's GPTQ checkpoints have them).
  test "biases of zeros are left out, others are refused", %{tmp_dir: dir} do
    folder = copy("gptq", dir)
    {:ok, scores} = Bombus.score(Bombus.load_model!(folder), [1, 5, 9, 2])
    bias = fn data -> &[{@q <> ".bias", "F16", [div(byte_size(data), 2)], data} | &1] end

    Fixtures.edit_tensor_list(folder, @tensors, bias.(<<0::128>>))
    assert Bombus.score(Bombus.load_model!(folder), [1, 5, 9, 2]) == {:ok, scores}

    other = copy("gptq", dir)
    Fixtures.edit_tensor_list(other, @tensors, bias.(<<0::112, 1::16>>))
    assert {:error, %Error{reason: :bad_checkpoint} = error} = Bombus.load_model(other)
    assert error.message =~ "#{@q}.bias"
  end

  @tag skip: if(!System.get_env("BOMBUS_PYTHON"), do: "BOMBUS_PYTHON names no Python with mlx_lm")
  test "mlx-lm reads what is saved, and scores as it does its own", %{tmp_dir: dir} do
    folder = copy("awq", dir)
    saved = Path.join(dir, "saved")
    :ok = Bombus.save_model(Bombus.load_model!(folder), saved)

    script = """
    import sys
    import mlx.core as mx
    from pathlib import Path
    from mlx_lm.utils import load_model
    theirs, ours = (load_model(Path(path))[0] for path in sys.argv[1:])
    x = mx.array([[1, 5, 9, 2]])
    assert mx.array_equal(ours(x), theirs(x))
    """

    python = System.get_env("BOMBUS_PYTHON")
    {output, status} = System.cmd(python, ["-c", script, folder, saved], stderr_to_stdout: true)
    assert status == 0, output
  end

  describe "what mlx-lm refuses is refused:" do
    for {what, field, value, word} <- [
          {"other bits", "bits", 8, "8 bits"},
          {"another method", "quant_method", "exl2", "exl2"}
        ] do
      test what, %{tmp_dir: dir} do
        folder = copy("awq", dir)

        Fixtures.edit_json(
          folder,
          "config.json",
          &put_in(&1, ["quantization_config", unquote(field)], unquote(value))
        )

        assert {:error, %Error{reason: :unsupported} = error} = Bombus.load_model(folder)
        assert error.message =~ unquote(word)
        assert error.message =~ ":int"
      end
    end

    test "groups that are not of neighbours", %{tmp_dir: dir} do
      for {name, change} <- [
            # As mlx-lm: any g_idx beside words in AWQ's order.
            {"gptq-as-awq",
             &[
               {@q <> ".g_idx", "I32", [128], for(_input <- 1..128, into: "", do: <<0::32>>)} | &1
             ]},
            {"gptq",
             fn tensors ->
               Enum.map(tensors, fn
                 {@q <> ".g_idx" = name, dtype, shape, data} ->
                   {name, dtype, shape, reversed(data)}

                 other ->
                   other
               end)
             end}
          ] do
        folder = copy(name, dir)
        Fixtures.edit_tensor_list(folder, @tensors, change)
        assert {:error, %Error{reason: :unsupported} = error} = Bombus.load_model(folder)
        assert error.message =~ "#{@q}.g_idx"
        assert error.message =~ "desc_act"
      end
    end

    test "shapes of another layout", %{tmp_dir: dir} do
      for {suffix, shape, reason} <- [
            {"qweight", [64, 16], :unsupported},
            {"qweight", [1, 1024], :unsupported},
            {"scales", [64, 2], :unsupported},
            {"qzeros", [8, 2], :bad_checkpoint}
          ] do
        folder = copy("awq", dir)

        Fixtures.edit_tensor_list(folder, @tensors, fn tensors ->
          Enum.map(tensors, fn {name, dtype, old, data} ->
            {name, dtype, if(name == "#{@q}.#{suffix}", do: shape, else: old), data}
          end)
        end)

        assert {:error, %Error{} = error} = Bombus.load_model(folder)
        assert error.reason == reason, error.message
        assert error.message =~ @q
      end
    end

    test "no word of which it is", %{tmp_dir: dir} do
      folder = copy("awq", dir)
      Fixtures.edit_json(folder, "config.json", &Map.delete(&1, "quantization_config"))
      assert {:error, %Error{reason: :unsupported} = error} = Bombus.load_model(folder)
      assert error.message =~ "quantization_config"
    end
  end
end
